"""Boxes in conversations: <box>[[x1, y1, x2, y2], …]</box>, in thousandths of the picture, or in pixels to be made thousandths.

In: the texts of a sample and the sizes of its pictures.  Out: texts whose boxes count thousandths.  Raises DataError for boxes
outside the picture. InternVL2 is taught <ref>name</ref><box>[[…]]</box> in 0 to 1000.
"""

import ast
import re
from collections.abc import Sequence

from tessella.chat import Message
from tessella.errors import DataError
from tessella.geometry import Size

BOX = re.compile(r"<box>(.*?)</box>", re.DOTALL)
FULL = 1000


def has_boxes(messages: Sequence[Message]) -> bool:
    return any("<box>" in message.text for message in messages)


def check_boxes(messages: Sequence[Message]) -> None:
    """Raises DataError for a box that is no list of fours, or lies outside 0 to 1000."""
    for message in messages:
        for found in BOX.finditer(message.text):
            for four in _fours(found[1]):
                _check(four, Size(FULL, FULL), "0 to 1000; if they count pixels, say --boxes pixels")


def from_pixels(messages: Sequence[Message], sizes: Sequence[Size]) -> tuple[Message, ...]:
    """The same with pixels made thousandths. Several pictures must be of one size, or nobody knows which one is meant."""
    if len(set(sizes)) != 1:
        if not has_boxes(messages):
            return tuple(messages)
        count = f"{len(sizes)} pictures of different sizes" if sizes else "no picture"
        raise DataError(f"boxes in pixels: of {count}, so they cannot be made thousandths; write thousandths")
    size = sizes[0]

    def thousandths(found: re.Match[str]) -> str:
        fours = _fours(found[1])
        for four in fours:
            _check(four, size, f"the picture's {size.width_px} x {size.height_px} px")
        sides = (size.width_px, size.height_px) * 2
        scaled = [[round(FULL * number / side) for number, side in zip(four, sides, strict=True)] for four in fours]
        return f"<box>{scaled}</box>"

    return tuple(Message(message.role, BOX.sub(thousandths, message.text)) for message in messages)


def _fours(text: str) -> list[list[float]]:
    """[[x1, y1, x2, y2], …], or one four alone. Raises DataError."""
    try:
        read = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise DataError(f"broken box: {text[:60]!r}, must be [[x1, y1, x2, y2], …]") from error
    fours = [read] if isinstance(read, list) and read and not isinstance(read[0], list) else read
    if not isinstance(fours, list) or not fours:
        raise DataError(f"broken box: {text[:60]!r}, must be [[x1, y1, x2, y2], …]")
    for four in fours:
        numbers = isinstance(four, list) and len(four) == 4 and all(type(number) in (int, float) for number in four)
        if not numbers:
            raise DataError(f"broken box: {str(four)[:60]}, must be four numbers x1, y1, x2, y2")
    return fours


def _check(four: Sequence[float], size: Size, limit: str) -> None:
    x1, y1, x2, y2 = four
    if not (0 <= x1 <= x2 <= size.width_px and 0 <= y1 <= y2 <= size.height_px):
        raise DataError(f"box outside: {list(four)} must lie in {limit}, x1 before x2 and y1 before y2")
