"""Any layout into any other, and the proof that nothing changed.

In: a model, an adapter, a LoRA training checkpoint or XTuner's .pth, and a layout to make.  Out: the folder and its Proofs; or
an error, and nothing that looks done. Tensors pass through one at a time (source.py), so size costs time and disk, not memory.
Merging is float32 arithmetic; each tensor is stored in the base's own type unless another is asked for. The proof reloads what
was written before it gets its name. A stopped conversion is gone on with by the same command (folder.py).
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from tessella.checkpoint.adapters import settings_of, state_of, write_adapter_files
from tessella.checkpoint.fingerprint import fingerprint
from tessella.checkpoint.folder import check_place, new_folder, read_manifest
from tessella.checkpoint.gguf_write import write_gguf
from tessella.checkpoint.lowrank import named
from tessella.checkpoint.names import Layout, native_layout
from tessella.checkpoint.proof import Mode, Proofs, prove
from tessella.checkpoint.routing import copy_routing
from tessella.checkpoint.source import KINDS, Kind, Origin, Source, file_state, open_source
from tessella.checkpoint.tensor_proof import Verdict, compare_file
from tessella.checkpoint.weights import Entry, some
from tessella.checkpoint.write import SHARD_BYTES, dtype_name, write_model
from tessella.errors import CheckpointError, ConfigError
from tessella.inputs import Inputs
from tessella.model.device import DTYPES, choose_device

Target = Literal["official", "native", "adapter", "gguf"]
Names = Literal["ours", "official", "native"]
GGUF = "model.gguf and mmproj.gguf for llama.cpp"
BASE = "base"  # folder beside an adapter that was split off, for what is left


@dataclass(frozen=True)
class Wish:
    """How OUT is to be. dtype: "base" keeps each tensor's own type; or "float32", "bfloat16", "float16"."""

    to: Target = "official"
    names: Names = "ours"  # of an adapter's modules
    dtype: str = "base"
    shard_bytes: int = SHARD_BYTES
    force: bool = False  # replace OUT when we made it and nobody changed it
    proof: Mode = "auto"
    device: str = "cpu"  # where the proof runs models

    def __post_init__(self) -> None:
        if self.dtype != "base" and self.dtype not in DTYPES:
            raise ConfigError(f'dtype "{self.dtype}" is not known; say base, {", ".join(DTYPES)}')
        if self.shard_bytes < 10**6:
            raise ConfigError(f"shards of {self.shard_bytes / 1e9:g} GB are too small; at least 0.001")
        if self.names != "ours" and self.to != "adapter":
            raise ConfigError(f"--names {self.names} is for adapters; say --to adapter, or leave it away")
        if self.dtype != "base" and self.to == "adapter":
            raise ConfigError("an adapter keeps the type in which it was taught; leave --dtype away")

    @property
    def stored(self) -> torch.dtype | None:
        return None if self.dtype == "base" else DTYPES[self.dtype]


@dataclass(frozen=True)
class ConvertResult:
    """What was written and how close it is."""

    folder: Path
    source: Path
    kind: Kind
    to: Target
    base: Path  # the model folder behind the source; the source itself when it is one
    merged_pairs: int  # linear layers with a low-rank change: merged, or written as an adapter
    replaced_tensors: int  # tensors that the adapter holds whole
    stored: str  # type of most of the weights
    num_bytes: int
    proof: Proofs
    seconds: float
    quantised: tuple[str, ...] = ()  # parts of the base that were in four bits while the adapter was taught

    @property
    def about(self) -> str:
        """What was done, in a line."""
        taught = f"{self.merged_pairs} low-rank layers and {self.replaced_tensors} whole tensors "
        if self.to == "adapter":
            return f"{taught}as an adapter, {self.num_bytes / 1e6:,.1f} MB"
        where = " into the unquantised base (taught on one in 4 bits)" if self.quantised else ""
        merged = f", {taught}merged{where}" if self.merged_pairs or self.replaced_tensors else ""
        to = GGUF if self.to == "gguf" else KINDS[self.to]
        return f"{KINDS[self.kind]} -> {to}{merged}, {self.num_bytes / 1e9:,.2f} GB in {self.stored}"

    def as_json(self) -> dict[str, Any]:
        """Stable keys for --json."""
        return {
            "folder": str(self.folder),
            "source": str(self.source),
            "kind": self.kind,
            "to": self.to,
            "base": str(self.base),
            "adapter": str(self.source) if self.merged_pairs or self.replaced_tensors else None,
            "merged_pairs": self.merged_pairs,
            "replaced_tensors": self.replaced_tensors,
            "taught_in_4_bits": list(self.quantised),
            "stored": self.stored,
            "bytes": self.num_bytes,
            "largest_logit_difference": self.proof.largest_difference,
            "proof": self.proof.as_json(),
            "seconds": round(self.seconds, 2),
        }


def convert(source: str | Path, out: str | Path, wish: Wish | None = None, origin: Origin | None = None) -> ConvertResult:
    """Write what source is as another layout, and prove it.

    origin: the base of an adapter or .pth, where it does not name one itself.
    Raises CheckpointError, ConfigError; out is then as it was before.
    """
    start = time.perf_counter()
    wish, out = wish or Wish(), Path(out).expanduser()
    check_place(out, num_bytes=0, force=wish.force)
    found = open_source(source, origin)
    refuse_overlap(out, found.places)
    device = choose_device(wish.device)
    if wish.to == "adapter":
        proof, entries = _write_adapter(found, out, wish, (origin or Origin()).base, device)
    elif wish.to == "gguf":
        proof, entries = write_gguf(found, out, wish.stored, force=wish.force)
    else:
        layout = native_layout(found.config) if wish.to == "native" else wish.to
        proof, entries = _write_model(found, out, wish, layout, device)
    adapter = found.adapter
    return ConvertResult(
        folder=out,
        source=found.path,
        kind=found.kind,
        to=wish.to,
        base=found.folder,
        merged_pairs=0 if adapter is None else len(adapter.pairs),
        replaced_tensors=0 if adapter is None else len(adapter.whole),
        stored=dtype_name(entries),
        num_bytes=sum(entry.num_bytes for entry in entries),
        proof=proof,
        seconds=time.perf_counter() - start,
        quantised=() if adapter is None else adapter.quantised,
    )


def refuse_overlap(out: Path, places: Sequence[Path]) -> None:
    """Raises CheckpointError when out is, holds, or lies in what is read from."""
    for place in places:
        ours, theirs = out.resolve(), place.resolve()
        if ours == theirs or ours in theirs.parents or theirs in ours.parents:
            where = "is" if ours == theirs else "holds" if ours in theirs.parents else "lies in"
            raise CheckpointError(f"{out} {where} {place}, which is read from; give another place to write to")


def refuse_official(source: Source) -> None:
    """Raises CheckpointError for a relative of InternVL: the official layout has no words for it."""
    config = source.config
    if config.family != "internvl":
        raise CheckpointError(
            f"{source.path} is a {config.family} model, and the official InternVL layout can say neither its tower, nor its "
            f'connector ("{config.connector.kind}"), nor its tile rule ("{config.tile_rule}"); say --to native'
        )


def _write_model(source: Source, out: Path, wish: Wish, layout: Layout, device: torch.device) -> tuple[Proofs, list[Entry]]:
    if layout == "official":
        refuse_official(source)
    entries = source.entries(wish.stored)
    proofs: list[Proofs] = []
    known: dict[str, Verdict] = {}
    rounding = wish.stored is not None

    def look(file: Path) -> None:  # while both sides of it are still in the page cache: a large model is read once
        known.update(compare_file(source, file, layout, rounding=rounding))

    def check(written: Path) -> None:
        copy_routing(source.routing, written)
        again = open_source(written)
        proof = prove(source, again, mode=wish.proof, device=device, rounding=rounding, known=known)
        proof.require(f"{source.path} as {KINDS['official' if layout == 'official' else 'native']}")
        proofs.append(proof)

    write_model(
        entries,
        out,
        source.config,
        layout=layout,
        end_ids=Inputs.load(source.folder, source.config).stop_ids,
        base_folder=source.folder,
        shard_bytes=wish.shard_bytes,
        force=wish.force,
        look=look,
        check=check,
        plan=plan_of(source, wish),
    )
    return proofs[0], entries


def plan_of(source: Source, wish: Wish) -> str:
    """A word for exactly this work on exactly these files."""
    work = [wish.to, wish.dtype, wish.shard_bytes, source.kind, file_state(source)]
    scales = {} if source.adapter is None else {name: pair.scale for name, pair in source.adapter.pairs.items()}
    return hashlib.sha256(json.dumps([work, scales], sort_keys=True).encode()).hexdigest()


def _write_adapter(
    source: Source, out: Path, wish: Wish, told_base: str | None, device: torch.device
) -> tuple[Proofs, list[Entry]]:
    """The adapter of a source alone. What a LoRA training checkpoint holds beside it goes to OUT/base, unless a base is told."""
    if source.adapter is None:
        raise CheckpointError(f"{source.path} is {KINDS[source.kind]} and holds no adapter; say --to official or --to native")
    plain = replace(source, adapter=None)
    splits = source.kind == "lora" and told_base is None
    if source.kind == "lora" and told_base is not None:
        require_same_base(plain, told_base)
    adapter = source.adapter
    if wish.names != "ours":
        layout = native_layout(source.config) if wish.names == "native" else wish.names
        adapter = named(adapter, layout, source.shapes, source.config.language)
    base = str(out.resolve() / BASE) if splits else told_base or source.base
    state = state_of(adapter)
    entries = plain.entries() if splits else []
    num_bytes = sum(tensor.numel() * tensor.itemsize for tensor in state.values()) + sum(entry.num_bytes for entry in entries)
    hashes: dict[str, str] = {}
    with new_folder(out, num_bytes=num_bytes + 2**20, force=wish.force, known_hashes=hashes) as aside:
        if splits:
            _write_model(plain, aside / BASE, replace(wish, to="official", names="ours"), "official", device)
            hashes |= {f"{BASE}/{name}": digest for name, (_, digest) in read_manifest(aside / BASE).items()}
        write_adapter_files(aside, state, settings_of(adapter, base, fingerprint(plain.shapes, plain.untaught)))
        copy_routing(source.routing, aside)
        again = open_source(aside, Origin(base=str(aside / BASE) if splits else base))
        proof = prove(source, again, mode=wish.proof, device=device)
        proof.require(f"{source.path} as {KINDS['adapter']}")
    return proof, [Entry(name, tuple(tensor.shape), tensor.dtype, tensor.clone) for name, tensor in state.items()]


def require_same_base(plain: Source, told_base: str) -> None:
    """Raises CheckpointError unless the base a person named holds what the training checkpoint was taught on."""
    other = open_source(told_base)
    proof = prove(plain, other, mode="tensors")
    if proof.config or proof.tensors.differing:
        told = some([*proof.config, *proof.tensors.differing], 2)
        raise CheckpointError(f"{told_base} is not the base of {plain.path}: {told}; leave --base away, and it is written beside")
