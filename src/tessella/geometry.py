"""Where a picture lies on a grid of tiles: LLaVA-NeXT's rule ("anyres"), and the shapes that all rules share.

In: the size of a picture, the grids to choose from.  Out: a grid, the size of the picture in it, the window that shows it.
Source: mm_utils.py and llava_arch.py of haotian-liu/LLaVA at c121f04; image_processing_utils.py and modeling_llava_next.py of
huggingface/transformers at 5.23, whose rounding is followed where the two differ.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple


class Grid(NamedTuple):
    """How many tiles side by side, and how many one above the other."""

    columns: int
    rows: int


class Size(NamedTuple):
    """Of an upright picture."""

    width_px: int
    height_px: int


class Window(NamedTuple):
    """The part of a picture's map of patches that shows the picture; what lies around it is padding. Counted in patches.

    A picture that is not cut, but shown whole alone, has a grid of no tiles.
    """

    grid: Grid
    top: int
    left: int
    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        """Visual tokens of the window, with the newline behind each row; the newline alone where nothing was cut."""
        return self.rows * (self.columns + 1) if self.rows else 1


UNCUT = Grid(0, 0)


def roomiest_grid(size: Size, grids: Iterable[Grid], side_px: int) -> Grid:
    """The grid in which most of the picture's pixels are kept; of several such the one with the least waste, then the first."""
    best, best_kept, best_waste = UNCUT, 0, math.inf
    for grid in grids:
        width, height = grid.columns * side_px, grid.rows * side_px
        scale = min(width / size.width_px, height / size.height_px)
        kept = min(int(size.width_px * scale) * int(size.height_px * scale), size.width_px * size.height_px)
        waste = width * height - kept
        if kept > best_kept or (kept == best_kept and waste < best_waste):
            best, best_kept, best_waste = grid, kept, waste
    return best


def fitted(size: Size, room: Size) -> Size:
    """The largest size of the picture's own aspect within room; the free side rounded up."""
    across, down = room.width_px / size.width_px, room.height_px / size.height_px
    if across < down:
        return Size(room.width_px, min(math.ceil(size.height_px * across), room.height_px))
    return Size(min(math.ceil(size.width_px * down), room.width_px), room.height_px)


def window_of(size: Size, grid: Grid, patches_per_side: int) -> Window:
    """The window of a picture that was fitted into a grid and padded evenly on both sides."""
    columns, rows = grid.columns * patches_per_side, grid.rows * patches_per_side
    if not rows:
        return Window(grid, 0, 0, 0, 0)
    if size.width_px / size.height_px > columns / rows:
        shown = int(round(size.height_px * (columns / size.width_px), 7))
        top = (rows - shown) // 2
        return Window(grid, top, 0, rows - 2 * top, columns)
    shown = int(round(size.width_px * (rows / size.height_px), 7))
    left = (columns - shown) // 2
    return Window(grid, 0, left, rows, columns - 2 * left)
