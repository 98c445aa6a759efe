"""Checkpoints of a run: written whole or not at all, checked by their hashes before they are believed.

In: the tensors and numbers of a run.  Out: output/checkpoints/step-000123/ with state.safetensors, state.json and a manifest.
No pickle: safetensors and JSON only.
"""

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tessella.checkpoint.folder import new_folder, read_manifest, sha256_of
from tessella.checkpoint.weights import Weights, entries_of, write_file
from tessella.errors import CheckpointError, TrainingError
from tessella.train.recipe import Recipe

FOLDER, TENSORS, NUMBERS = "checkpoints", "state.safetensors", "state.json"
RECIPE = "recipe.toml"  # in the output folder: the recipe of the run


@dataclass(frozen=True)
class Progress:
    """The numbers of a run that resume goes on from. Chance needs none: what is drawn is a function of seed, step and rank."""

    step: int  # optimizer steps taken
    total_steps: int
    settled: dict[str, Any]  # Recipe.settled()
    data: str  # hash of the samples and their order
    seconds: float  # spent so far, over all sittings
    worth: float | None = None  # held-out score, or the held-out loss with a minus before it; None when not evaluated here
    recent: list[list[float]] = field(default_factory=list)  # loss and norm of the steps since the last report
    before: list[float] = field(default_factory=list)  # losses that a jump is measured against
    passed_over: list[int] = field(default_factory=list)  # steps that are not learned from, counted from 0


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    progress: Progress
    tensors: dict[str, Tensor]


def save(output: Path, progress: Progress, tensors: dict[str, Tensor], keep: int, keep_best: bool = False) -> Path:
    """Write a checkpoint, then remove all but the newest `keep` and, with keep_best, the one of greatest worth.

    Raises TrainingError when the disk has no room.
    """
    folder = output / FOLDER / f"step-{progress.step:06d}"
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    hashes: dict[str, str] = {}
    try:
        if folder.is_dir() and damage(folder) is not None:
            shutil.rmtree(folder)  # resume passed over it; now its step has come again
        with new_folder(folder, num_bytes=num_bytes + 2**16, force=True, known_hashes=hashes) as aside:
            hashes[TENSORS] = write_file(aside / TENSORS, entries_of(tensors))
            (aside / NUMBERS).write_text(json.dumps(asdict(progress), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except CheckpointError as error:
        raise TrainingError(
            f"the run could not be saved at step {progress.step}: {error}. Older checkpoints stand; {go_on(output)}"
        ) from error
    prune(output, keep, keep_best)
    return folder


def prune(output: Path, keep: int, keep_best: bool) -> None:
    """Remove all checkpoints but the newest `keep` and, with keep_best, the best one."""
    folders = saved(output)
    best_one = best(output) if keep_best else None
    for old in folders[keep:]:
        if old != best_one:
            # Renamed first: a kill in the middle of removing must not leave what looks like a broken checkpoint.
            aside = old.with_name(f".{old.name}.removed")
            shutil.rmtree(aside, ignore_errors=True)
            old.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)


def best(output: Path) -> Path | None:
    """The checkpoint of greatest worth, the earlier one of two equals; None when none was evaluated."""
    worth = {folder: _worth(folder) for folder in reversed(saved(output))}
    judged = {folder: value for folder, value in worth.items() if value is not None}
    return max(judged, key=lambda folder: judged[folder]) if judged else None


def _worth(folder: Path) -> float | None:
    try:
        value = json.loads((folder / NUMBERS).read_text(encoding="utf-8")).get("worth")
    except (OSError, ValueError, AttributeError):
        return None  # damaged; damage() tells that when somebody wants to go on from it
    return float(value) if isinstance(value, int | float) else None


def go_on(output: Path, *flags: str) -> str:
    """How to go on with a run, in words that can be copied."""
    return " ".join(["go on with: tessella finetune", shlex.quote(str(output / RECIPE)), "--resume", *flags])


def saved(output: Path) -> list[Path]:
    """Checkpoint folders of a run, the newest first; not yet checked."""
    folders = (output / FOLDER).glob("step-*")
    return sorted((f for f in folders if f.is_dir() and f.name[5:].isdigit()), key=lambda f: int(f.name[5:]), reverse=True)


def newest(output: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, or None, and what is to be told of broken ones. Raises TrainingError when all are broken."""
    told: list[str] = []
    folders = saved(output)
    for folder in folders:
        broken = damage(folder)
        if broken is None:
            return read(folder), told
        told.append(f"{folder} is broken ({broken}), so it is passed over")
    if folders:
        raise TrainingError(f"no checkpoint in {output / FOLDER} is whole: {'; '.join(told)}; remove them and start anew")
    return None, told


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint by its manifest; None when each file is there with its hash."""
    try:
        files = read_manifest(folder)
    except CheckpointError as error:
        return str(error)
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes, must have {size:,}"
        if sha256_of(path) != digest:
            return f"{name} has another hash than when it was written"
    return None if {TENSORS, NUMBERS} <= files.keys() else "its manifest lacks the state"


def read(folder: Path) -> Checkpoint:
    """A checkpoint that damage() found whole."""
    weights = Weights([folder / TENSORS])
    numbers = json.loads((folder / NUMBERS).read_text(encoding="utf-8"))
    # Cloned: a view of the mapped file would change or vanish when the file is removed by a later checkpoint.
    return Checkpoint(folder, Progress(**numbers), {name: weights[name].clone() for name in weights.files})


def before(output: Path, step: int) -> Path | None:
    """The newest whole checkpoint of fewer steps than `step`; None when there is none."""
    return next((folder for folder in saved(output) if int(folder.name[5:]) < step and damage(folder) is None), None)


def check_same_run(progress: Progress, recipe: Recipe, data: str, total_steps: int, changed: Callable[[], str]) -> None:
    """Raises TrainingError naming what differs from the run that wrote the checkpoint. changed: what differs in the data."""
    changes = list(recipe.changes_from(progress.settled))
    if data != progress.data:
        changes.append(f"the training samples are not the same ({changed()})")
    if not changes and total_steps != progress.total_steps:
        changes.append(f"total steps were {progress.total_steps:,}, are {total_steps:,}")
    if changes:
        raise TrainingError(
            f"the checkpoint in {recipe.output} is of another recipe: {'; '.join(changes)}. "
            "Resume with the old values, or give another output"
        )
