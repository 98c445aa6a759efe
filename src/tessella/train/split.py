"""Which samples are held out, and how often the others are seen.

In: drafts or samples, a share, a seed.  Out: groups to hold out; samples repeated.  The choice hangs on what is said and shown
and on the seed, never on the order of the rows.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tessella.errors import DataError
from tessella.train.readers import Draft
from tessella.train.sample import Sample


def is_held_out(draft: Draft, held: frozenset[str]) -> bool:
    return draft.part == "held_out" or (draft.part == "" and draft.group in held)


def held_out_groups(drafts: Sequence[Draft], held_out: float, seed: int) -> frozenset[str]:
    """Groups of drafts to hold out: the seed's choice, whole groups, even over the strata, whatever the order of the rows.

    None when held_out is 0, or when the data itself says what is held out. At least one group stays to learn from.
    """
    if held_out == 0 or any(draft.part for draft in drafts):
        return frozenset()
    wanted = max(1, round(held_out * len(drafts))) if held_out < 1 else int(held_out)
    if held_out >= 1 and drafts and wanted >= len(drafts):
        raise DataError(
            f"held_out is {wanted:,}, but there are only {len(drafts):,} samples; hold out fewer, or a share such as 0.1"
        )
    sizes = Counter(draft.group for draft in drafts)
    order = _in_seeded_order({draft.group: draft.stratum for draft in drafts}, seed)
    taken: list[str] = []
    count = 0
    for group in order[: max(0, len(order) - 1)]:
        if count >= wanted:
            break
        taken.append(group)
        count += sizes[group]
    return frozenset(taken)


def _in_seeded_order(stratum_of: Mapping[str, str], seed: int) -> list[str]:
    """Groups so ordered that each beginning of the list holds about the same share of every stratum."""
    by_stratum: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for group, stratum in stratum_of.items():
        digest = hashlib.sha256(f"{seed}/{group}".encode("utf-8", "surrogatepass")).hexdigest()
        by_stratum[stratum].append((digest, group))
    placed = []
    for members in by_stratum.values():
        for rank, (digest, group) in enumerate(sorted(members)):
            placed.append(((rank + 0.5) / len(members), digest, group))
    return [group for _, _, group in sorted(placed)]


def repeat(samples: Sequence[Sample], times: float, seed: int) -> list[Sample]:
    """2.5 gives each sample twice and a seeded half of them once more; copies have keys of their own, to be augmented apart.

    A sample's own repeat multiplies times; samples that are repeated alike are one lot.
    """
    lots: dict[float, list[Sample]] = defaultdict(list)
    for sample in samples:
        lots[sample.repeat].append(sample)
    return [sample for own, lot in lots.items() for sample in _repeated(lot, own * times, seed)]


def _repeated(samples: Sequence[Sample], times: float, seed: int) -> list[Sample]:
    share, whole = math.modf(times)
    order = _in_seeded_order({sample.key: "" for sample in samples}, seed)
    more = set(order[: round(share * len(order))])
    rounds = [list(samples)] * int(whole) + [[sample for sample in samples if sample.key in more]]
    return [replace(sample, key=f"{sample.key}#{n}" if n else sample.key) for n, some in enumerate(rounds) for sample in some]


def times_of(weights: Sequence[float], counts: Sequence[float]) -> list[float]:
    """How often each dataset is seen in an epoch, so that they stand in it as their weights and the epoch is as long as all.

    Raises DataError when a dataset with a weight is empty.
    """
    total, whole = sum(counts), sum(weights)
    if any(weight and not count for weight, count in zip(weights, counts, strict=True)):
        raise DataError(f"weights is {list(weights)}, but one of these datasets has nothing to train on; leave it out")
    return [weight / whole * total / count if count else 0.0 for weight, count in zip(weights, counts, strict=True)]
