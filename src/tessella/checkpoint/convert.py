"""Adapter and base become one official folder, and it is proved that the folder answers like the two.

In: an adapter folder, its base.  Out: the merged folder and the Proof; or an error, and nothing that looks done.
Merging is float32 arithmetic, one tensor at a time from the mapped base; each tensor is stored in the base's own type.
The proof reloads what was written, before it gets its name.
"""

import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessella.checkpoint.adapters import Adapter, attach, fit, learned_in, read_adapter
from tessella.checkpoint.folder import check_place
from tessella.checkpoint.read import find_model, load_model
from tessella.checkpoint.verify import LIMITS, Proof, compare, logits_on, probes
from tessella.checkpoint.weights import Entry, entries_of
from tessella.checkpoint.write import write_official
from tessella.errors import CheckpointError, ConfigError
from tessella.inputs import Inputs, ModelInput
from tessella.model.device import DTYPES, choose_device
from tessella.model.vision_language import VisionLanguageModel
from tessella.tokenizer import Tokenizer


@dataclass(frozen=True)
class ConvertResult:
    """What was written and how close it is."""

    folder: Path
    base: Path
    adapter: Path
    merged_pairs: int  # linear layers that got their low-rank change
    replaced_tensors: int  # tensors that the adapter holds whole
    stored: str  # type of most of the weights
    proof: Proof
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Stable keys for --json."""
        return {
            "folder": str(self.folder),
            "base": str(self.base),
            "adapter": str(self.adapter),
            "merged_pairs": self.merged_pairs,
            "replaced_tensors": self.replaced_tensors,
            "stored": self.stored,
            "largest_logit_difference": self.proof.largest_difference,
            "proof": {**asdict(self.proof), "holds": self.proof.holds},
            "seconds": round(self.seconds, 2),
        }


def convert_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    force: bool = False,
    dtype: str = "base",
    device: str = "cpu",
) -> ConvertResult:
    """Merge an adapter into its base, write the official folder, prove it.

    base: default is what the adapter names.  force: replace out when we made it and nobody changed it.
    dtype: "base" stores each tensor in the base's own type; or "float32", "bfloat16", "float16".  device: where the proof runs.
    Raises CheckpointError, ConfigError; out is then as it was before.
    """
    start = time.perf_counter()
    adapter, out, where = learned_in(Path(adapter).expanduser()), Path(out).expanduser(), choose_device(device)
    if dtype != "base" and dtype not in DTYPES:
        raise ConfigError(f'dtype "{dtype}" is not known; say base, {", ".join(DTYPES)}')
    check_place(out, num_bytes=0, force=force)
    found = read_adapter(adapter)
    base_folder = find_base(adapter, base)
    if out.resolve() in (base_folder.resolve(), adapter.resolve()):
        raise CheckpointError(f"{out} is the base or the adapter itself; give another place to write to")
    model, _ = load_model(base_folder)  # mapped, each tensor in its own type
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    found = fit(found, shapes, model.config.language)
    if found.changes_nothing():
        raise CheckpointError(
            f"{adapter} changes nothing: all {len(found.pairs)} of its low-rank products are zero, as before the first step; "
            "teach it first"
        )
    inputs = Inputs(model.config, Tokenizer.load(base_folder))
    prompts = probes(inputs)
    entries = merged_entries(model, found, None if dtype == "base" else DTYPES[dtype])
    check_place(out, num_bytes=sum(entry.num_bytes for entry in entries), force=force)  # before minutes of work, not after
    untaught, wanted = unmerged_logits(base_folder, found, prompts, where)
    stored = coarsest(entries, found)
    proofs: list[Proof] = []

    def prove(written: Path) -> None:
        again, _ = load_model(written, device=where, dtype=torch.float32)
        proof = compare(wanted, logits_on(again, prompts), stored, untaught=untaught)
        proof.require(f"the merged model of {adapter} on {base_folder}")
        proofs.append(proof)

    write_official(entries, out, model.config, end_ids=inputs.stop_ids, base_folder=base_folder, force=force, check=prove)
    seconds = time.perf_counter() - start
    type_name = str(stored).removeprefix("torch.")
    return ConvertResult(out, base_folder, adapter, len(found.pairs), len(found.whole), type_name, proofs[0], seconds)


def find_base(adapter: Path, base: str | Path | None) -> Path:
    """The base's folder. Raises CheckpointError when it is not here, or is itself an adapter."""
    if base is None:
        return find_model(adapter)[0]
    folder, other = find_model(base)
    if other is not None:
        raise CheckpointError(f"the base {base} is itself an adapter; convert that one first, and give the folder it makes")
    return folder


def merged_entries(model: VisionLanguageModel, adapter: Adapter, dtype: torch.dtype | None) -> list[Entry]:
    """Every parameter, merged when it is written. A weight is widened first when it is to be stored wider than the base."""
    state = {name: weight.detach() for name, weight in model.named_parameters()}
    return [replace(entry, make=partial(_merged, adapter, entry, state[entry.name])) for entry in entries_of(state, dtype)]


def _merged(adapter: Adapter, entry: Entry, weight: Tensor) -> Tensor:
    return adapter.merged(entry.name, weight.to(entry.dtype) if entry.dtype.itemsize > weight.dtype.itemsize else weight)


def coarsest(entries: list[Entry], adapter: Adapter) -> torch.dtype:
    """The coarsest type among the tensors that the adapter touches: it sets how close the proof can be."""
    touched = {
        entry.dtype for entry in entries if entry.name in adapter.whole or entry.name.removesuffix(".weight") in adapter.pairs
    }
    return max(touched, key=lambda dtype: LIMITS.get(dtype, 0.0))


def unmerged_logits(
    base_folder: Path, adapter: Adapter, prompts: list[ModelInput], device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of the base (first prompts), and of the base with the adapter beside it (all), in float32 arithmetic."""
    model, _ = load_model(base_folder, device=device, dtype=torch.float32)
    untaught = logits_on(model, prompts[:2])  # enough to see how much the adapter changes; a third pass over all would be dear
    attach(model, adapter)
    return untaught, logits_on(model, prompts)
