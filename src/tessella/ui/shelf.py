"""The quick bar's pictures, by kind.

In: a folder with a subfolder a kind, or rows that the caller made.  Out: rows of named pictures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tessella.errors import DataError
from tessella.ui.words import LANGUAGES

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
ROW_PICTURES = 60  # more would be a long way to scroll, and 200 KB to send


@dataclass(frozen=True)
class Item:
    """A picture to try. names: by language."""

    path: Path
    names: Mapping[str, str]


@dataclass(frozen=True)
class Row:
    """Pictures of one kind. more: how many the kind has beyond those."""

    names: Mapping[str, str]
    items: Sequence[Item]
    more: int = 0


def rows_of_folder(folder: Path) -> list[Row]:
    """Each subfolder is a row, pictures beside them are one more; in the order of their names, hidden ones left out.

    Raises DataError when the folder is none, or has no picture.
    """
    try:
        kinds = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        rows = [row for kind in (*kinds, folder) if (row := _row(kind)).items]
    except OSError as error:
        raise DataError(
            f"{folder} cannot be read ({error.strerror}); give a folder with a subfolder of pictures for each kind"
        ) from error
    if not rows:
        raise DataError(f"{folder} has no picture in it or in its subfolders; there may be {', '.join(ENDINGS)}")
    return rows


def _row(folder: Path) -> Row:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS and path.is_file())
    items = [Item(path, dict.fromkeys(LANGUAGES, path.stem)) for path in files[:ROW_PICTURES]]
    return Row(dict.fromkeys(LANGUAGES, folder.name), items, len(files) - len(items))
