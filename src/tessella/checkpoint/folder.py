"""Folders that appear whole or not at all, and that we write over only when we made them.

In: a target and a function that fills an empty folder.  Out: the target and a manifest (size and sha256 of each file).
The folder is filled aside, synced to the disk, and renamed; whatever stops it, the target is as it was before.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tessella.errors import CheckpointError

MANIFEST = "tessella_manifest.json"
SPARE_BYTES = 64 * 2**20  # room left on the disk beyond what we write


@contextlib.contextmanager
def new_folder(
    target: Path, *, num_bytes: int, force: bool = False, known_hashes: dict[str, str] | None = None
) -> Iterator[Path]:
    """Give an empty folder aside; when the block ends well it becomes target, otherwise it is gone.

    num_bytes: what will be written, compared with the free room first.  force: replace a folder that we made and nobody changed.
    known_hashes: filled by the block with sha256 of files that it hashed while writing, so that they are not read again.
    Raises CheckpointError when target is not ours, or when there is no room.
    """
    target = target.absolute()
    check_replaceable(target, force=force)
    parent = target.parent
    aside = parent / f".{target.name}.{os.getpid()}.part"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        check_room(parent, num_bytes)
        _sweep(parent, target.name)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        yield aside
        _write_manifest(aside, known_hashes or {})
        _swap(aside, target)
    except OSError as error:
        raise CheckpointError(f"could not write {target}: {error}; nothing was changed there") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_place(target: Path, *, num_bytes: int, force: bool = False) -> None:
    """check_replaceable, and whether target's disk takes num_bytes and lets us write. Raises CheckpointError."""
    check_replaceable(target, force=force)
    parent = next(path for path in target.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CheckpointError(f"{parent} does not let us write {target.name} into it; give another place to write to")
    check_room(parent, num_bytes)


def check_replaceable(target: Path, *, force: bool = False) -> None:
    """Raises CheckpointError unless target is absent, empty, or, with force, ours and unchanged since."""
    if not target.exists() and not target.is_symlink():
        return
    if target.is_symlink() or not target.is_dir():
        raise CheckpointError(f"{target} is no folder of ours; give another place to write to")
    if not any(target.iterdir()):
        return
    if not (target / MANIFEST).is_file():
        raise CheckpointError(
            f"{target} is not empty and was not made by tessella (it has no {MANIFEST}); give another place to write to"
        )
    changed = changed_files(target)
    if changed:
        raise CheckpointError(f"{target} was changed since we made it ({', '.join(changed[:5])}); move it, or give another place")
    if not force:
        raise CheckpointError(f"{target} exists; say --force to replace it, or give another place to write to")


def changed_files(folder: Path) -> list[str]:
    """Files that are new, gone, or of another size or content than the manifest says.

    Files over 64 MiB are compared by size alone: hashing tens of GB only to replace them would take minutes.
    """
    recorded = read_manifest(folder)
    here = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file() and not _foreign(path)}
    changed = [name for name in here if name not in recorded] + [name for name in recorded if name not in here]
    for name in here.keys() & recorded.keys():
        size, digest = recorded[name]
        if here[name].stat().st_size != size or (size <= 2**26 and sha256_of(here[name]) != digest):
            changed.append(name)
    return sorted(changed)


def _foreign(path: Path) -> bool:
    """Files that others leave behind by merely looking: they are nobody's work."""
    return path.name in (MANIFEST, ".DS_Store") or "__pycache__" in path.parts


def read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """File name -> (bytes, sha256). Raises CheckpointError when there is no manifest of ours or it is damaged."""
    path = folder / MANIFEST
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {str(name): (int(row["bytes"]), str(row["sha256"])) for name, row in files.items()}
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path} is no manifest of ours ({error!r}); move {folder} away") from error


def check_room(folder: Path, num_bytes: int) -> None:
    """Raises CheckpointError when the disk of folder has no room for num_bytes and a little more."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes + SPARE_BYTES:
        raise CheckpointError(
            f"{(num_bytes + SPARE_BYTES) / 2**20:,.0f} MiB are needed in {folder}, {free / 2**20:,.0f} MiB are free; "
            "free some, or write to another disk"
        )


def sha256_of(path: Path) -> str:
    """The hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_manifest(folder: Path, known_hashes: dict[str, str]) -> None:
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        sync(path)
        files[name] = {"bytes": path.stat().st_size, "sha256": known_hashes.get(name) or sha256_of(path)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"made_by": "tessella", "version": 1, "files": files}, indent=2) + "\n", encoding="utf-8")
    sync(manifest)
    sync(folder)


def _swap(aside: Path, target: Path) -> None:
    """Rename aside to target; an old target steps aside first and is removed when the new one stands."""
    old = target.parent / f".{target.name}.{os.getpid()}.old"
    if target.exists():
        target.rename(old)
    try:
        aside.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sweep(parent: Path, name: str) -> None:
    """Remove what a killed process left aside; a living process's folder stays."""
    for left in [*parent.glob(f".{name}.*.part"), *parent.glob(f".{name}.*.old")]:
        pid = left.name.removeprefix(f".{name}.").split(".")[0]
        if pid.isdigit() and int(pid) != os.getpid() and not _alive(int(pid)):
            if left.name.endswith(".old") and not (parent / name).exists():
                left.rename(parent / name)  # killed between the two renames: the old folder comes back
            else:
                shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
