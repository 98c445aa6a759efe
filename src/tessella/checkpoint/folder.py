"""Folders that appear whole or not at all, and that we write over only when we made them.

In: a target and a function that fills an empty folder.  Out: the target and a manifest (size and sha256 of each file).
The folder is filled aside, synced to the disk, and renamed; whatever stops it, the target is as it was before.
A large folder can be gone on with: what a stopped run had finished aside is kept for the next run with the same plan.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tessella.config import read_json
from tessella.errors import CheckpointError

MANIFEST = "tessella_manifest.json"
UNFINISHED = "tessella_unfinished.json"  # in a folder aside: the plan, and the files that are done
SPARE_BYTES = 64 * 2**20  # room left on the disk beyond what we write


@contextlib.contextmanager
def new_folder(
    target: Path,
    *,
    num_bytes: int,
    force: bool = False,
    known_hashes: dict[str, str] | None = None,
    plan: str | None = None,
) -> Iterator[Path]:
    """Give a folder aside; when the block ends well it becomes target, otherwise it is gone.

    num_bytes: what will be written, compared with the free room first.  force: replace a folder that we made and nobody changed.
    known_hashes: filled by the block with sha256 of files that it hashed while writing, so that they are not read again.
    plan: what is going to be written, in a word that is the same only for the same bytes. With a plan the folder may begin
    with files of a stopped run (finished_files says which), and when this run is stopped its own finished files stay.
    Raises CheckpointError when target is not ours, or when there is no room.
    """
    target = target.absolute()
    check_replaceable(target, force=force)
    parent = target.parent
    aside = parent / f".{target.name}.{os.getpid()}.part"
    kept = False
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent, target.name, plan, aside)
        check_room(parent, num_bytes - sum(size for size, _ in _done(aside).values()))
        if not aside.is_dir():
            aside.mkdir()
            if plan is not None:
                _write_done(aside, plan, {})
        yield aside
        (aside / UNFINISHED).unlink(missing_ok=True)
        _write_manifest(aside, known_hashes or {})
        _swap(aside, target)
    except OSError as error:
        kept = bool(_done(aside))
        left = f"; what was finished lies in {aside}: the same command goes on from there" if kept else ""
        raise CheckpointError(f"could not write {target}: {error}; nothing was changed there{left}") from error
    except (KeyboardInterrupt, SystemExit):
        kept = bool(_done(aside))
        raise
    finally:
        if not kept:
            shutil.rmtree(aside, ignore_errors=True)


def finished_files(aside: Path) -> dict[str, str]:
    """File name -> sha256 of the files that a stopped run left finished and whole, read again to be sure; others are removed."""
    whole: dict[str, str] = {}
    for name, (size, digest) in _done(aside).items():
        path = aside / name
        if path.is_file() and path.stat().st_size == size and sha256_of(path) == digest:
            whole[name] = digest
    for path in aside.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in whole and path.name != UNFINISHED:
            path.unlink()
    return whole


def note_finished(aside: Path, name: str, digest: str) -> None:
    """Remember a file that is written and synced, for the run that comes after a stop. Without a plan nothing is kept."""
    if (aside / UNFINISHED).is_file():
        done = {**_done(aside), name: ((aside / name).stat().st_size, digest)}
        _write_done(aside, _plan_of(aside) or "", done)


def _plan_of(aside: Path) -> str | None:
    path = aside / UNFINISHED
    return str(read_json(path).get("plan")) if path.is_file() else None


def _done(aside: Path) -> dict[str, tuple[int, str]]:
    path = aside / UNFINISHED
    rows = read_json(path).get("done", {}) if path.is_file() else {}
    return {str(name): (int(size), str(digest)) for name, (size, digest) in rows.items()}


def _write_done(aside: Path, plan: str, done: dict[str, tuple[int, str]]) -> None:
    new = aside / f"{UNFINISHED}.new"
    new.write_text(json.dumps({"plan": plan, "done": done}), encoding="utf-8")
    sync(new)
    new.replace(aside / UNFINISHED)  # a run killed here leaves the old list or the new one, never half of one


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
    """Manifests themselves, and files that others leave behind by merely looking: they are nobody's work."""
    return path.name in (MANIFEST, ".DS_Store") or "__pycache__" in path.parts


def read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """File name -> (bytes, sha256). Raises CheckpointError when there is no manifest of ours or it is damaged."""
    path = folder / MANIFEST
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {str(name): (int(row["bytes"]), str(row["sha256"])) for name, row in files.items()}
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path} is no manifest of ours ({error!r}); move {folder} away") from error


def check_room(folder: Path, num_bytes: int, way_out: str = "write to another disk") -> None:
    """Raises CheckpointError when the disk of folder has no room for num_bytes and a little more."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes + SPARE_BYTES:
        raise CheckpointError(
            f"{-(-(num_bytes + SPARE_BYTES) // 2**20):,} MiB are needed in {folder}, {free // 2**20:,} MiB are free; "
            f"free some, or {way_out}"
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
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not _foreign(path)):
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


def _sweep(parent: Path, name: str, plan: str | None, ours: Path) -> None:
    """Remove what stopped runs left aside, but for the one of our plan, which becomes ours; a living run's folder stays."""
    for left in [*parent.glob(f".{name}.*.part"), *parent.glob(f".{name}.*.old")]:
        pid = left.name.removeprefix(f".{name}.").split(".")[0]
        if not pid.isdigit() or (int(pid) != os.getpid() and _alive(int(pid))):
            continue
        if left.name.endswith(".old") and not (parent / name).exists():
            left.rename(parent / name)  # killed between the two renames: the old folder comes back
        elif plan is not None and _plan_of(left) == plan and (left == ours or not ours.exists()):
            left.rename(ours)
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
