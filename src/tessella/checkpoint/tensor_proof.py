"""Do two models hold the same tensors? Bit by bit; and where an adapter was merged, with the merge done again in float64.

In: two Sources.  Out: a Verdict on each parameter, summed up in a TensorProof.
Where both sides hold a parameter's bytes as they are, in whatever order of rows, the pieces of the two files are compared as they
are read; a tensor that differs is then put together, to say how. A merged number must be the nearest of its type to the exact
one. What rounding leaves of an adapter is the share of its change that is found again: what lies below half a unit in the last
place is lost, however right each number is.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tessella.checkpoint.names import Layout, group_of
from tessella.checkpoint.source import ExactRows, Source
from tessella.checkpoint.streams import Span, Strips, from_disk, pieces, side_by_side
from tessella.checkpoint.weights import Weights, some

KEPT = 0.5  # a merge whose rounding leaves less than this of the adapter is none
WORTH_TELLING = 0.99
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
THREADS = min(4, os.cpu_count() or 1)  # parameters that are compared at once


@dataclass(frozen=True)
class Sums:
    """Over numbers that were merged again."""

    numbers: int = 0
    difference: float = 0.0  # squares of stored - exact
    effect: float = 0.0  # squares of what the adapter changes
    kept: float = 0.0  # of (stored - base) times what the adapter changes: effect again, when nothing was lost

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))


@dataclass(frozen=True)
class Verdict:
    """What came of one parameter."""

    kind: Literal["equal", "rounded", "merged", "differing"]
    num_bytes: int = 0  # that were read on both sides
    told: str = ""  # what differs
    sums: Sums = Sums()


@dataclass(frozen=True)
class TensorProof:
    """How the tensors compare. rounded: equal after rounding to the other side's coarser type; merged: done again in float64."""

    equal: int
    rounded: int
    merged: int
    differing: tuple[str, ...]  # a sentence each
    num_bytes: int
    difference_rms: float | None = None  # of the merged numbers from the exact ones, and what the adapter changed them by
    effect_rms: float | None = None
    kept: float | None = None  # share of the adapter's change that is in the stored numbers

    @property
    def drowned(self) -> bool:
        return self.kept is not None and self.kept < KEPT

    def __str__(self) -> str:
        parts = [f"{self.equal} equal bit by bit"]
        parts += [f"{self.rounded} equal after rounding"] if self.rounded else []
        parts += [f"{self.merged} merged to the nearest number{self._told_kept()}"] if self.merged else []
        parts += [f"{len(self.differing)} differ: {some(self.differing, 3)}"] if self.differing else []
        return ", ".join(parts)

    def _told_kept(self) -> str:
        if self.kept is None or self.kept > WORTH_TELLING:
            return ""
        return f" (rounding keeps {self.kept:.0%} of the adapter; --dtype float32 keeps all of it)"


def compare_tensors(
    a: Source, b: Source, *, rounding: bool, advance: Callable[[int], None], known: Mapping[str, Verdict] | None = None
) -> TensorProof:
    """Every parameter of either side. A few tensors, or pieces of tensors, of each are in memory at a time.

    known: verdicts on parameters that were compared before, while they were written.
    """
    found = dict(known or {})
    names = list(dict.fromkeys([*a.shapes, *b.shapes]))
    left = [name for name in names if name not in found]
    found |= _equal_as_they_lie(a, b, left, advance, a_from_disk=True)
    found |= _compare_all(a, b, [name for name in left if name not in found], rounding, advance)
    return summed(found[name] for name in names)


def compare_file(a: Source, file: Path, layout: Layout, *, rounding: bool) -> dict[str, Verdict]:
    """Verdicts on the parameters that one finished file of weights holds whole, in a model that is still being written.

    The file is read from the disk. What it was written from was read a moment ago, and most of it is still in the page cache.
    """
    weights = Weights([file])
    held = [
        name for name in a.shapes if all(stored in weights.files for stored in group_of(name, layout, a.config.language).stored)
    ]
    b = replace(a, path=file, layout=layout, weights=weights, adapter=None, shapes={name: a.shapes[name] for name in held})
    found = _equal_as_they_lie(a, b, held, _nowhere, a_from_disk=False)
    return found | _compare_all(a, b, [name for name in held if name not in found], rounding, _nowhere)


def _nowhere(_: int) -> None:
    pass


def _equal_as_they_lie(
    a: Source, b: Source, names: Iterable[str], advance: Callable[[int], None], *, a_from_disk: bool
) -> dict[str, Verdict]:
    """Verdicts on the parameters whose bytes, as they lie in the files of both, are the same."""
    pairs: dict[str, tuple[Strips, Strips]] = {}
    for name in names:
        if name in a.shapes and a.shapes[name] == b.shapes.get(name) and a.dtype(name) == b.dtype(name):
            one, other = a.strips(name), b.strips(name)
            if one is not None and other is not None:
                pairs[name] = (from_disk(one) if a_from_disk else one, from_disk(other))
    places = [(name, left, right) for name, pair in pairs.items() for left, right in side_by_side(*pair)]
    differing: set[str] = set()
    both: list[Span | memoryview] = [span for _, left, right in places for span in (left, right)]
    with contextlib.closing(pieces(both, stand=2)) as ready:
        for name, span, _ in places:
            if not same_bytes(next(ready), next(ready)):
                differing.add(name)
            advance(2 * span.num_bytes)
    return {name: Verdict("equal", 2 * pair[0].num_bytes) for name, pair in pairs.items() if name not in differing}


def same_bytes(a: memoryview, b: memoryview) -> bool:
    """Whether two pieces of one length are equal.

    numpy in words of 8 bytes, because it lets other threads run: 0.03 s a GB in a processor's cache, in single bytes 0.08;
    memoryviews compare themselves in 1.5.
    """
    words = len(a) // 8 * 8
    in_words = np.array_equal(np.frombuffer(a[:words], np.uint64), np.frombuffer(b[:words], np.uint64))
    return in_words and bytes(a[words:]) == bytes(b[words:])


def _compare_all(
    a: Source, b: Source, names: Sequence[str], rounding: bool, advance: Callable[[int], None]
) -> dict[str, Verdict]:
    """Several at once; those that lie together on one side are compared by one thread, which remembers what it read last."""

    def compare(batch: list[str]) -> list[Verdict]:
        verdicts = []
        for name in batch:
            verdicts.append(compare_one(a, b, name, rounding=rounding))
            advance(verdicts[-1].num_bytes)
        return verdicts

    batches: list[list[str]] = []
    last: tuple[str, ...] = ()
    for name in names:
        lies = tuple(group_of(name, side.layout, side.config.language).stored[0] for side in (a, b))
        if batches and set(lies) & set(last):
            batches[-1].append(name)
        else:
            batches.append([name])
        last = lies
    with ThreadPoolExecutor(THREADS) as pool:
        found = [one for verdicts in pool.map(compare, batches) for one in verdicts]
    return dict(zip(names, found, strict=True))


def summed(verdicts: Iterable[Verdict]) -> TensorProof:
    every = list(verdicts)
    sums = sum((one.sums for one in every), Sums())
    counts = {kind: sum(one.kind == kind for one in every) for kind in ("equal", "rounded", "merged")}
    return TensorProof(
        **counts,
        differing=tuple(one.told for one in every if one.kind == "differing"),
        num_bytes=sum(one.num_bytes for one in every),
        difference_rms=(sums.difference / sums.numbers) ** 0.5 if sums.numbers else None,
        effect_rms=(sums.effect / sums.numbers) ** 0.5 if sums.numbers else None,
        kept=sums.kept / sums.effect if sums.effect else None,
    )


def compare_one(a: Source, b: Source, name: str, *, rounding: bool) -> Verdict:
    """One parameter of both sides."""
    if name not in a.shapes or name not in b.shapes:
        return Verdict("differing", told=f"{name} is missing in {b.path if name in a.shapes else a.path}")
    if a.shapes[name] != b.shapes[name]:
        hint = ", as if transposed" if a.shapes[name] == b.shapes[name][::-1] else ""
        return Verdict("differing", told=f"{name} is {a.shapes[name]} and {b.shapes[name]}{hint}")
    if a.touches(name) or b.touches(name):
        if a.touches(name) and b.touches(name):
            return _compare_changes(a, b, name)
        taught, merged = (a, b) if a.touches(name) else (b, a)
        return merged_verdict(taught, name, merged.untaught(name))
    return _compare_stored(a, b, name, rounding)


def _compare_stored(a: Source, b: Source, name: str, rounding: bool) -> Verdict:
    """No adapter is involved -> "equal", "rounded", or what differs."""
    left, right = a.tensor(name), b.tensor(name)
    size = left.numel() * left.itemsize + right.numel() * right.itemsize
    same_type = left.dtype == right.dtype
    if not same_type and not rounding:
        return Verdict("differing", size, f"{name} is stored as {a.dtype(name)} and {b.dtype(name)}")
    # either may be the rounded side, and both are: bfloat16 has fewer digits than float16, which has fewer small numbers
    if same_bits(left.to(right.dtype), right) or same_bits(left, right.to(left.dtype)):
        return Verdict("equal" if same_type else "rounded", size)
    difference = (left.float() - right.float()).abs()
    share = float((left != right).float().mean())
    told = f"{name} differs in {share:.1%} of its numbers, by up to {float(difference.max()):.2g}{_swapped(b, name, left)}"
    return Verdict("differing", size, told)


def _swapped(b: Source, name: str, left: Tensor) -> str:
    """A word on what may have happened: the classic fault is k in v's place."""
    for one, other in (("k_proj", "v_proj"), ("v_proj", "k_proj")):
        twin = name.replace(one, other)
        if one in name and twin in b.shapes and b.shapes[twin] == left.shape and torch.equal(b.tensor(twin).to(left.dtype), left):
            return f"; its numbers stand in {twin}"
    return ""


def merged_verdict(taught: Source, name: str, stored: Tensor) -> Verdict:
    """stored: what the merge of that parameter should have given. It is done again in float64.

    Each stored number must be the nearest of its type to the exact one. Where float32 sums leave it open which is the nearest,
    because the exact one lies within their error of the middle between two, either will do.
    """
    base = taught.untaught(name)
    wrong, sums = 0, Sums(numbers=stored.numel())
    for rows in taught.exact(name, base):
        found = stored[rows.begin : rows.end]
        error = rows.error + torch.finfo(torch.float32).eps * rows.merged.abs()
        low, high = (rows.merged - error).to(stored.dtype), (rows.merged + error).to(stored.dtype)
        nearest = (low <= found) & (found <= high) & found.isfinite()  # so counted a NaN is wrong too
        wrong += nearest.numel() - int(nearest.sum())
        sums += sums_of(found.double(), base[rows.begin : rows.end].double(), rows)
    told = _wrong_merge(name, stored, base, wrong, sums) if wrong else ""
    size = base.numel() * base.itemsize + stored.numel() * stored.itemsize
    return Verdict("differing" if wrong else "merged", size, told, sums)


def _wrong_merge(name: str, stored: Tensor, base: Tensor, wrong: int, sums: Sums) -> str:
    """What is wrong, and what may have happened: left out, or scaled otherwise."""
    share = wrong / stored.numel()
    told = f"{name} is not what the merge gives: {share:.1%} of its numbers are not the nearest to base + scale * B A"
    if stored.dtype == base.dtype and same_bits(stored, base):
        return f"{told}; it is the base's, as if the adapter had been left out"
    factor = sums.kept / sums.effect if sums.effect else 1.0
    return f"{told}; it moved {factor:.2g} times as far as the adapter says" if abs(factor - 1) > 0.2 else told


def sums_of(found: Tensor, base: Tensor, rows: ExactRows) -> Sums:
    """What TensorProof sums up of merged rows, all in float64; their numbers are counted once a parameter."""
    return Sums(
        difference=float((found - rows.merged).square().sum()),
        effect=float(rows.change.square().sum()),
        kept=float(((found - base) * rows.change).sum()),
    )


def _compare_changes(a: Source, b: Source, name: str) -> Verdict:
    """Both sides hold an adapter: the bases must be equal, and what the adapters change."""
    left, right = a.untaught(name), b.untaught(name)
    size = left.numel() * left.itemsize + right.numel() * right.itemsize
    if left.dtype != right.dtype or not same_bits(left, right):
        return Verdict("differing", size, f"{name} differs between the bases")
    wrong = 0
    for one, other in zip(a.exact(name, left), b.exact(name, right), strict=True):
        near = (one.change - other.change).abs() <= one.error + other.error
        wrong += near.numel() - int(near.sum())
    told = f"{name} is changed otherwise, in {wrong / left.numel():.1%} of its numbers" if wrong else ""
    return Verdict("differing" if wrong else "merged", size, told)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one type and shape hold the same bits; a NaN equals itself here."""
    kind = INTEGERS[a.itemsize]
    return torch.equal(a.contiguous().reshape(-1).view(kind), b.contiguous().reshape(-1).view(kind))
