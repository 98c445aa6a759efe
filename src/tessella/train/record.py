"""What a run was, beside its numbers: output/run.json and output/recipe.toml, from the start on.

In: recipe, model, data, ranks.  Out: two files that `tessella runs` and the run page read; a run that was killed has them too.
"""

import json
import platform
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tessella.checkpoint.read import Loaded
from tessella.files import write_whole
from tessella.provenance import provenance
from tessella.train.dataset import Ledger, Sample
from tessella.train.recipe import Recipe
from tessella.train.state import RECIPE
from tessella.train.streamed import Streamed
from tessella.train.taught import Taught
from tessella.train.world import World

RECORD = "run.json"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "safetensors", "tokenizers", "pillow", "tessella")
LABELS = 12  # of the data table; the rest is counted
SKIPPED = 50  # kept by name; the rest is counted


class Record:
    """Only the first rank writes."""

    def __init__(self, recipe: Recipe, world: World):
        self.recipe, self.main = recipe, world.main
        self.values: dict[str, Any] = {
            "state": "running",
            "began": time.time(),  # of this sitting, finer than origin's date, so that runs have an order
            "ranks": world.size,
            "parallel": "" if world.alone else recipe.parallel,
        }

    def start(
        self,
        loaded: Loaded,
        taught: Taught,
        samples: Sequence[Sample],
        held_out: Sequence[Sample],
        ledger: Ledger,
        total_steps: int,
    ) -> None:
        """Raises WriteError."""
        if not self.main:
            return
        write_whole(self.recipe.output / RECIPE, replace(self.recipe, resume=False).to_toml())
        self.values |= {
            "origin": asdict(provenance()),
            "packages": installed(),
            "system": platform.platform(),
            "model": self.recipe.model,
            "family": loaded.config.family,
            "device": str(loaded.model.device),
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
            "learning_parameters": taught.count(),
            "total_steps": total_steps,
            "data": data_table(samples, held_out, ledger),
        }
        self._write()

    def end(self, state: str, **values: Any) -> None:
        """state: "finished", "stopped" or "failed". Raises WriteError."""
        if self.main:
            self.values |= {"state": state, "ended": datetime.now().astimezone().isoformat(timespec="seconds"), **values}
            self._write()

    def _write(self) -> None:
        write_whole(self.recipe.output / RECORD, json.dumps(self.values, ensure_ascii=False, indent=1) + "\n")


def data_table(samples: Sequence[Sample], held_out: Sequence[Sample], ledger: Ledger) -> dict[str, Any]:
    """What the run learned from, in counts."""
    counts = {"train": len(samples), "held_out": len(held_out)}
    if isinstance(samples, Streamed):
        return {**counts, "streamed": True, "skipped": len(ledger.skipped), "notes": ledger.notes}
    labels = Counter(sample.label for sample in samples if sample.label)
    return {
        **counts,
        "pictures": sum(len(sample.pictures) for sample in samples),
        "text_only": sum(not sample.pictures for sample in samples),
        "tokens": sum(sample.tokens for sample in samples),
        "longest": max((sample.tokens for sample in samples), default=0),
        "classes": len(labels),
        "labels": labels.most_common(LABELS),
        "skipped": len(ledger.skipped),
        "reasons": ledger.reasons(),
        "skipped_places": [list(row) for row in ledger.skipped[:SKIPPED]],
        "notes": ledger.notes,
    }


def installed() -> dict[str, str]:
    """Versions of the packages that decide what a run computes; what is not installed is left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # an extra that this machine does without
            continue
    return {"python": platform.python_version(), **found}


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a run; None where there is none that can be read."""
    try:
        values = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
