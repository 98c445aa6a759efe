"""Low-rank changes of a model: whose they are, how they are named, and what they make of a weight. Float32 arithmetic.

In: low-rank pairs and whole tensors under our names, the official ones (InternLM2's and Phi-3's fused layers), or native ones.
Out: the same under our names, fitted to a base; merged weights; or the same under other names.
A fused layer's pair falls into parts without loss: the parts share its A, and B's rows are shared out. The way back is exact
too: parts that have one A are put together again, others are stacked, which widens the rank (A of the parts one upon the
other, B block by block). r rank, I inputs, O outputs: A (r, I), B (O, r), merged W + scale * B A.
With DoRA each row of that sum then gets a learned length m (O,): merged m * (W + scale * B A) / |W + scale * B A|, row by row.
Source: arXiv:2106.09685, arXiv:2402.09353.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tessella.checkpoint.names import (
    Group,
    Layout,
    as_in_files,
    as_in_memory,
    cut_rows,
    fuse_rows,
    group_of,
    group_of_stored,
    row_counts,
)
from tessella.checkpoint.weights import some
from tessella.config import LanguageConfig
from tessella.errors import CheckpointError

CHUNK_NUMBERS = 2**24  # numbers of a weight that are widened to float32 at once: 64 MiB
NATIVE_BEGINNINGS = (
    *("model.language_model.", "model.vision_tower.", "model.multi_modal_projector."),  # in memory
    *("vision_tower.", "multi_modal_projector.", "lm_head.", "image_newline."),  # in files
)


@dataclass(frozen=True)
class Pair:
    """One low-rank change: scale * b @ a; with a magnitude (DoRA), the length of each row of the sum besides."""

    a: Tensor  # (r, I)
    b: Tensor  # (O, r)
    scale: float
    magnitude: Tensor | None = None  # (O,)

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def delta(self, begin: int = 0, end: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The low-rank product's rows begin to end, (O, I)."""
        return (self.b[begin:end].to(dtype) @ self.a.to(dtype)) * self.scale

    def merged_rows(self, weight: Tensor, begin: int = 0, end: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """weight: rows begin to end as the base has them -> the same rows with the change, in dtype."""
        merged = weight.to(dtype) + self.delta(begin, end, dtype).to(weight.device)
        if self.magnitude is None:
            return merged
        length = torch.linalg.vector_norm(merged, dim=1, keepdim=True)
        return merged * (self.magnitude[begin:end].to(weight.device, dtype)[:, None] / length)

    def exact_rows(self, weight: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """merged_rows in float64, and how far float32 sums may be off: a bound for each number, by Cauchy and Schwarz."""
        b, a = self.b[begin:end].double().norm(dim=1), self.a.double().norm(dim=0)
        eps = torch.finfo(torch.float32).eps
        error = torch.outer(b, a) * (eps * (self.rank + 2) * abs(self.scale))
        merged = self.merged_rows(weight, begin, end, torch.float64)
        if self.magnitude is not None:
            length = torch.linalg.vector_norm(weight.double() + self.delta(begin, end, torch.float64), dim=1)
            factor = self.magnitude[begin:end].double().abs() / length
            error = error * factor[:, None] + 16 * eps * merged.abs()  # a length is a sum of squares, of pairs of pairs
        return merged, error

    def added_to(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The merged weight, rounded once: to dtype, or the weight's own type.

        A large one is made in pieces, so that it is never twice in memory in float32.
        """
        merged = torch.empty_like(weight, dtype=dtype or weight.dtype, memory_format=torch.contiguous_format)
        rows = max(1, CHUNK_NUMBERS // weight.shape[1])
        for begin in range(0, weight.shape[0], rows):
            end = begin + rows
            merged[begin:end] = self.merged_rows(weight[begin:end], begin, end)
        return merged

    def is_nothing(self) -> bool:
        return not (bool(self.b.any()) and bool(self.a.any()))


@dataclass(frozen=True)
class Adapter:
    folder: Path
    base: str  # what the adapter was taught on: a folder, a hub name, or "tessella-nano"
    pairs: dict[str, Pair]  # by module name, as "language_model.model.layers.0.self_attn.q_proj"
    whole: dict[str, Tensor]  # by parameter name, as "mlp1.1.weight"
    quantised: tuple[str, ...] = ()  # parts of the base that were in four bits while it was taught

    def touches(self, name: str) -> bool:
        """Whether the parameter of that name is changed."""
        return name in self.whole or (name.endswith(".weight") and name.removesuffix(".weight") in self.pairs)

    def merged(self, name: str, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The parameter of that name with the adapter merged in float32, and rounded once: to dtype, or the weight's own type."""
        dtype = dtype or weight.dtype
        if name in self.whole:
            return self.whole[name].to(device=weight.device, dtype=dtype)
        pair = self.pairs.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        return weight.to(dtype) if pair is None else pair.added_to(weight, dtype)

    @property
    def has_dora(self) -> bool:
        """Whether a pair has a magnitude: such a change hangs on the base's own weights."""
        return any(pair.magnitude is not None for pair in self.pairs.values())

    def changes_nothing(self) -> bool:
        """Whether every pair's product is zero and there is no whole tensor: untrained, or saved wrongly."""
        return not self.whole and all(pair.is_nothing() for pair in self.pairs.values())


def stacked(pairs: Sequence[Pair]) -> Pair:
    """One pair that is the sum of several on the same layer; its rank is the sum of theirs. Exact where the scales are equal."""
    first = pairs[0]
    if len(pairs) == 1:
        return first
    exact = len({pair.scale for pair in pairs}) == 1 and len({(pair.a.dtype, pair.b.dtype) for pair in pairs}) == 1
    if exact:
        return Pair(torch.cat([pair.a for pair in pairs]), torch.cat([pair.b for pair in pairs], dim=1), first.scale)
    b = [pair.b.float() * (pair.scale / first.scale) for pair in pairs]
    return Pair(torch.cat([pair.a.float() for pair in pairs]), torch.cat(b, dim=1), first.scale)


def fused(parts: Sequence[Pair | None], counts: Sequence[int], group: Group, language: LanguageConfig) -> Pair:
    """The pair of a fused layer from those of its parts, None for a part that is not changed. counts: rows of each part."""
    there = [pair for pair in parts if pair is not None]
    first = there[0]
    if any(pair.magnitude is not None for pair in there):
        return _fused_dora(parts, counts, group, language)
    if len(there) == len(parts) and all(torch.equal(pair.a, first.a) and pair.scale == first.scale for pair in there):
        return Pair(first.a, fuse_rows([pair.b for pair in there], group.rows, language), first.scale)
    wide, column = [], 0
    for pair, count in zip(parts, counts, strict=True):
        block = first.b.new_zeros(count, sum(one.rank for one in there), dtype=torch.float32)
        if pair is not None:
            block[:, column : column + pair.rank] = pair.b.float() * (pair.scale / first.scale)
            column += pair.rank
        wide.append(block)
    dtypes = {one.b.dtype for one in there}
    b = fuse_rows(wide, group.rows, language)
    if len(dtypes) == 1 and len({one.scale for one in there}) == 1:
        b = b.to(dtypes.pop())
    a = [one.a if len({x.a.dtype for x in there}) == 1 else one.a.float() for one in there]
    return Pair(torch.cat(a), b, first.scale)


def _fused_dora(parts: Sequence[Pair | None], counts: Sequence[int], group: Group, language: LanguageConfig) -> Pair:
    """fused() of pairs with magnitudes: rows keep their own lengths, so magnitudes are laid together like rows."""
    lengths = [pair.magnitude[:, None] for pair in parts if pair is not None and pair.magnitude is not None]
    if len(lengths) < len(parts):
        raise CheckpointError(
            f"{group.stored[0]} is one layer of three or two parts, and only {len(lengths)} of {len(parts)} have DoRA's "
            "magnitudes; teach all parts of it (q, k and v; gate and up), or convert to a model instead of an adapter"
        )
    plain = [None if pair is None else replace(pair, magnitude=None) for pair in parts]
    return replace(fused(plain, counts, group, language), magnitude=fuse_rows(lengths, group.rows, language)[:, 0])


def split(pair: Pair, names: Sequence[str], group: Group, language: LanguageConfig) -> dict[str, Pair]:
    """The pairs of the parts of a fused layer: one A for all, B's rows shared out.

    What a part does not use of a widened pair is left away again, and a part that is not changed at all has no pair.
    """
    if len(names) == 1:
        return {names[0]: pair}
    parts = cut_rows(pair.b, group.rows, language, len(names), f"{group.stored[0]}.lora_B")
    if pair.magnitude is not None:
        lengths = cut_rows(pair.magnitude[:, None], group.rows, language, len(names), f"{group.stored[0]}.lora_magnitude_vector")
        dora = zip(names, parts, lengths, strict=True)
        return {name: replace(pair, b=part, magnitude=length[:, 0]) for name, part, length in dora}
    return {name: _narrowed(replace(pair, b=part)) for name, part in zip(names, parts, strict=True) if bool(part.any())}


def _narrowed(pair: Pair) -> Pair:
    used = pair.b.any(dim=0)
    return pair if bool(used.all()) else replace(pair, a=pair.a[used], b=pair.b[:, used])


def layout_of(names: Iterable[str], where: Path) -> Layout:
    """Whether names of tensors or modules are native or official (ours count as official). Raises CheckpointError for both."""
    names = list(names)
    native = [name for name in names if f"{name}.".startswith(NATIVE_BEGINNINGS)]
    official = [name for name in names if f"{name}.".startswith(("vision_model.", "mlp1."))]
    if native and official:
        raise CheckpointError(
            f"{where} mixes two layouts: {official[0]} is an official name, {native[0]} a native one; "
            "write it again with one tool"
        )
    return "native" if native else "official"


def fit(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], language: LanguageConfig, native: Layout = "native") -> Adapter:
    """The adapter in our names, every tensor matched with a parameter of the base (shapes by our names).

    native: whose names those of transformers are, of the InternVL class or of a relative's.
    Raises CheckpointError naming what has no place in the base or another shape: an adapter of another model.
    """
    layout = layout_of([*adapter.pairs, *adapter.whole], adapter.folder)
    if layout == "native":
        layout = native
        adapter = _renamed(adapter, partial(as_in_files, layout=layout))
    pairs: dict[str, Pair] = {}
    for group, names in _groups([*adapter.pairs], layout, language):
        parts = [adapter.pairs.get(name) for name in group.stored]
        if len(group.ours) == 1 and len(parts) > 1:
            total = shapes.get(f"{group.ours[0]}.weight", (0,))[0]
            counts = row_counts(total, group.rows, language, len(parts), group.ours[0])
            _require_rows(parts, counts, names, adapter)
            pairs[group.ours[0]] = fused(parts, counts, group, language)
        else:
            pairs |= split(adapter.pairs[names[0]], group.ours, group, language)
    whole: dict[str, Tensor] = {}
    for group, names in _groups([*adapter.whole], layout, language):
        lost = [name for name in group.stored if name not in names]
        if lost:
            raise CheckpointError(f"{adapter.folder} holds {some(names)} whole, but not {some(lost)}, and they are one layer")
        whole |= group.to_ours([adapter.whole[name] for name in group.stored], language)
    found = replace(adapter, pairs=pairs, whole=whole)
    _check(found, shapes)
    return found


def _groups(names: Sequence[str], layout: Layout, language: LanguageConfig) -> list[tuple[Group, list[str]]]:
    """The groups that these stored names fall into, each with those of its names that are there."""
    found: dict[Group, list[str]] = {}
    for name in names:
        found.setdefault(group_of_stored(name, layout, language), []).append(name)
    return list(found.items())


def _require_rows(parts: Sequence[Pair | None], counts: Sequence[int], names: Sequence[str], adapter: Adapter) -> None:
    for pair, count in zip(parts, counts, strict=True):
        if pair is not None and pair.b.shape[0] != count:
            raise CheckpointError(
                f"wrong shapes: lora_B of {some(names)} has {pair.b.shape[0]} rows, must have {count}; {_its_base(adapter)}"
            )


def _check(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, pair in adapter.pairs.items():
        if pair.magnitude is not None and pair.magnitude.shape != pair.b.shape[:1]:
            raise CheckpointError(
                f"{name}: DoRA's magnitudes are {tuple(pair.magnitude.shape)}, lora_B has {pair.b.shape[0]} rows"
            )
    wanted: dict[str, tuple[int, ...]] = {
        f"{name}.weight": (pair.b.shape[0], pair.a.shape[1]) for name, pair in adapter.pairs.items()
    }
    wanted |= {name: tuple(tensor.shape) for name, tensor in adapter.whole.items()}
    lost = [name for name in wanted if name not in shapes]
    if lost:
        raise CheckpointError(
            f"{len(lost)} of {len(wanted)} tensors of {adapter.folder} have no place in the base: {some(lost)}; "
            f"{_its_base(adapter)}"
        )
    wrong = [
        f"{name} {shape} in the adapter, {shapes[name]} in the base" for name, shape in wanted.items() if shape != shapes[name]
    ]
    if wrong:
        raise CheckpointError(f"wrong shapes: {some(wrong, 3)}; {_its_base(adapter)}")


def _its_base(adapter: Adapter) -> str:
    """The way out, as far as the adapter says what it was taught on; XTuner's files and others do not."""
    if not adapter.base:
        return "give the base that it was taught on"
    return f'it says that it was taught on "{adapter.base}": give that base; if it was given, this is an adapter of another model'


def combined(first: Adapter, second: Adapter) -> Adapter:
    """Two fitted adapters, the second taught on base and first: one adapter on first's base with the effect of both."""
    pairs = dict(first.pairs)
    whole = dict(first.whole)
    for name, pair in second.pairs.items():
        parameter = f"{name}.weight"
        if name in pairs and (pair.magnitude is not None or pairs[name].magnitude is not None):
            raise CheckpointError(
                f"{second.folder} lies on {first.folder}, both change {name}, and one of them is DoRA, so that no one adapter "
                f"says the same; convert {first.folder} to a model first, then give that as --base"
            )
        if parameter in whole:
            whole[parameter] = pair.added_to(whole[parameter].float())
        else:
            pairs[name] = stacked([pairs[name], pair]) if name in pairs else pair
    for name, tensor in second.whole.items():
        whole[name] = tensor
        pairs.pop(name.removesuffix(".weight"), None)
    quantised = tuple(dict.fromkeys((*first.quantised, *second.quantised)))
    return Adapter(second.folder, first.base, pairs, whole, quantised)


def named(adapter: Adapter, layout: Layout, shapes: Mapping[str, tuple[int, ...]], language: LanguageConfig) -> Adapter:
    """A fitted adapter under a layout's names: the inverse of fit. Raises CheckpointError when a part of a layer is missing."""
    pairs: dict[str, Pair] = {}
    for group in dict.fromkeys(group_of(name, layout, language) for name in adapter.pairs):
        parts = [adapter.pairs.get(name) for name in group.ours]
        if len(group.stored) == 1 and len(parts) > 1:
            counts = [shapes[f"{name}.weight"][0] for name in group.ours]
            pairs[group.stored[0]] = fused(parts, counts, group, language)
        else:
            pairs |= split(adapter.pairs[group.ours[0]], group.stored, group, language)
    whole: dict[str, Tensor] = {}
    for group in dict.fromkeys(group_of(name, layout, language) for name in adapter.whole):
        lost = [name for name in group.ours if name not in adapter.whole]
        if lost:
            raise CheckpointError(
                f"{adapter.folder} holds a part of {group.stored[0]} whole, but not {some(lost)}; convert it to a model instead"
            )
        whole |= group.to_stored([adapter.whole[name] for name in group.ours], language)
    found = replace(adapter, pairs=pairs, whole=whole)
    return found if layout == "official" else _renamed(found, partial(as_in_memory, layout=layout))


def _renamed(adapter: Adapter, name: Callable[[str], str]) -> Adapter:
    pairs = {name(module): pair for module, pair in adapter.pairs.items()}
    return replace(adapter, pairs=pairs, whole={name(parameter): tensor for parameter, tensor in adapter.whole.items()})


def merge_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Merge a fitted adapter into the model in memory. Float32 arithmetic, each weight keeps its type."""
    for name, weight in list(model.named_parameters()):
        if adapter.touches(name):
            module, _, leaf = name.rpartition(".")
            merged = adapter.merged(name, weight.detach())
            setattr(model.get_submodule(module), leaf, nn.Parameter(merged, requires_grad=weight.requires_grad))


class OnTheFly(nn.Module):
    """A linear layer with its pair beside it, unmerged: y = W x + scale * B (A x), DoRA's rows scaled. The oracle of a merge."""

    def __init__(self, base: nn.Linear, pair: Pair):
        super().__init__()
        self.base, self.scale = base, pair.scale
        self.a, self.b = (x.to(base.weight.device, torch.float32) for x in (pair.a, pair.b))
        self.factor: Tensor | None = None  # (O,): magnitude by the length of the row
        if pair.magnitude is not None:
            sums = base.weight.detach().float() + pair.delta().to(base.weight.device)
            self.factor = pair.magnitude.to(sums) / torch.linalg.vector_norm(sums, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        low = nn.functional.linear(nn.functional.linear(x.float(), self.a), self.b)
        if self.factor is None:
            return (self.base(x).float() + self.scale * low).to(x.dtype)
        out = (nn.functional.linear(x, self.base.weight).float() + self.scale * low) * self.factor
        return (out if self.base.bias is None else out + self.base.bias.float()).to(x.dtype)


def attach(model: nn.Module, adapter: Adapter) -> None:
    """Hang a fitted adapter beside the model's linear layers without merging; whole tensors are put in place."""
    merge_adapter(model, replace(adapter, pairs={}))
    for name, pair in adapter.pairs.items():
        parent, _, leaf = name.rpartition(".")
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise CheckpointError(f"{name} is a {type(layer).__name__}; low-rank pairs sit on linear layers only")
        setattr(model.get_submodule(parent), leaf, OnTheFly(layer, pair))
