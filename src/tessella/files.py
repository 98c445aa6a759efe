"""A file appears whole or not at all.

In: a path and its content.  Out: the file; whatever stops it, what stood there before stands there still.
"""

import os
from pathlib import Path

from tessella.errors import WriteError


def write_whole(path: Path, content: str | bytes) -> None:
    """Write aside, bring it to the disk, rename; folders on the way are made. Raises WriteError with path and reason."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def check_place(flag: str, path: Path) -> None:
    """Raises WriteError when the path behind a flag can take no file."""
    folder = path.resolve().parent
    if not folder.is_dir():
        raise WriteError(f"{flag} {path}: {path.parent} is no folder; make it first")
    if path.is_dir():
        raise WriteError(f"{flag} {path} is a folder; name a file in it, such as {path / 'result.json'}")
    if not os.access(folder, os.W_OK):
        raise WriteError(f"{flag} {path}: {path.parent} does not let us write into it; name another place")


def cannot_write(path: Path, error: OSError) -> WriteError:
    """The error that says which file, why, and what can be done: a full disk's own error names no file."""
    return WriteError(f"{path} cannot be written ({error.strerror}); make room or check permissions, or give another path")
