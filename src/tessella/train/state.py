"""Checkpoints of a run: written whole or not at all, checked by their hashes before they are believed.

In: the tensors and numbers of a run.  Out: output/checkpoints/step-000123/ with state.safetensors, state.json and a manifest.
No pickle: safetensors and JSON only.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessella.checkpoint.folder import new_folder, read_manifest, sha256_of
from tessella.checkpoint.weights import Weights, entries_of, write_file
from tessella.errors import CheckpointError, TrainingError
from tessella.train.recipe import Recipe

FOLDER, TENSORS, NUMBERS = "checkpoints", "state.safetensors", "state.json"


@dataclass(frozen=True)
class Progress:
    """The numbers of a run that resume goes on from."""

    step: int  # optimizer steps taken
    total_steps: int
    settled: dict[str, Any]  # Recipe.settled()
    data: str  # hash of the samples and their order
    seconds: float  # spent so far, over all sittings


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    progress: Progress
    tensors: dict[str, Tensor]


def save(output: Path, progress: Progress, tensors: dict[str, Tensor], keep: int) -> Path:
    """Write a checkpoint, then remove all but the newest `keep`. Raises TrainingError when the disk has no room."""
    folder = output / FOLDER / f"step-{progress.step:06d}"
    tensors = tensors | random_state()
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    hashes: dict[str, str] = {}
    try:
        if folder.is_dir() and damage(folder) is not None:
            shutil.rmtree(folder)  # resume passed over it; now its step has come again
        with new_folder(folder, num_bytes=num_bytes + 2**16, force=True, known_hashes=hashes) as aside:
            hashes[TENSORS] = write_file(aside / TENSORS, entries_of(tensors))
            (aside / NUMBERS).write_text(json.dumps(asdict(progress), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except CheckpointError as error:
        raise TrainingError(f"the run could not be saved at step {progress.step}: {error}. Older checkpoints stand") from error
    for old in saved(output)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


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


def check_same_run(progress: Progress, recipe: Recipe, data: str, total_steps: int) -> None:
    """Raises TrainingError naming what differs from the run that wrote the checkpoint."""
    changes = list(recipe.changes_from(progress.settled))
    if data != progress.data:
        changes.append("the training samples are not the same (a data file, a picture folder or their order changed)")
    if not changes and total_steps != progress.total_steps:
        changes.append(f"total steps were {progress.total_steps:,}, are {total_steps:,}")
    if changes:
        raise TrainingError(
            f"the checkpoint in {recipe.output} is of another recipe: {'; '.join(changes)}. "
            "Resume with the old values, or give another output"
        )


def random_state() -> dict[str, Tensor]:
    """The generators that dropout draws from."""
    state = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random.cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["random.cpu"])
    if torch.cuda.is_available() and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"])
