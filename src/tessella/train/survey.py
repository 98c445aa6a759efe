"""What a dataset holds and what is wrong with it, before an hour of training shows the same.

In: a dataset, and the Inputs of the model that would learn from it.  Out: a Survey: lengths, tiles, picture sizes, one sample as
the model sees it with the learned tokens marked, and findings; as plain text or as a dict for JSON.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from tessella.chat import IMAGE_MARK
from tessella.image import count_tiles
from tessella.inputs import Inputs, ModelInput
from tessella.train.dataset import Ledger, RecipeData, Sample, read_dataset
from tessella.train.packing import Packing
from tessella.train.preflight import Fault, Preflight, look

LEARNED = ("«", "»")  # around what the loss counts
LONGEST = 5  # samples that are named


@dataclass(frozen=True)
class Spread:
    """A column of numbers in five."""

    name: str
    minimum: int
    median: int
    p95: int
    maximum: int
    total: int

    @classmethod
    def of(cls, name: str, values: Sequence[int]) -> "Spread":
        """The nearest value at each rank; values must not be empty."""
        ranked = sorted(values)
        last = len(ranked) - 1
        return cls(name, ranked[0], ranked[round(0.5 * last)], ranked[round(0.95 * last)], ranked[-1], sum(ranked))


@dataclass(frozen=True)
class Run:
    """A stretch of one sample's tokens that the loss counts, or does not."""

    text: str
    tokens: int
    learned: bool


@dataclass(frozen=True)
class Survey:
    """Everything that `tessella inspect DATA` says."""

    path: str
    samples: int
    skipped: int
    share_bad: float
    reasons: tuple[tuple[str, int], ...]
    spreads: tuple[Spread, ...]
    labels: tuple[tuple[str, int], ...]  # class or dish, most frequent first
    example_place: str
    example: tuple[Run, ...]
    findings: tuple[str, ...]  # what is wrong, the gravest first
    faults: tuple[Fault, ...] = ()  # the same and more, each with its place
    longest: tuple[tuple[str, int], ...] = ()  # place and tokens
    packing: Packing | None = None  # of an epoch, where a recipe says how it is packed
    compared: int = 0  # of the pictures, by what they show
    pictures: int = 0  # distinct ones

    def as_dict(self) -> dict[str, Any]:
        """Stable keys, for --json."""
        return asdict(self)


def survey(
    path: Path,
    inputs: Inputs,
    *,
    format: str = "auto",
    image_root: Path | None = None,
    choices: str = "hidden",
) -> Survey:
    """Read a dataset whole, decode its pictures, and look. Raises DataError when nothing in it is good."""
    samples, ledger = read_dataset(
        path,
        format=format,
        image_root=image_root,
        choices=choices,
        max_bad_share=1.0,
        inputs=inputs,
        decode=True,
        limit_megapixels=inputs.limit_megapixels,
    )
    data = RecipeData(samples, [], ledger)
    return survey_of(str(path), data, inputs, look(data, 0.0, inputs.limit_megapixels))


def survey_of(name: str, data: RecipeData, inputs: Inputs, found: Preflight, packing: Packing | None = None) -> Survey:
    """What was read, seen as one: samples that are learned from and those held out."""
    samples, ledger = [*(sample for sample in data.train if "#" not in sample.key), *data.held_out], data.ledger
    first = min(samples, key=lambda sample: (not sample.pictures, abs(len(sample.messages) - 2)))
    return Survey(
        path=name,
        samples=len(samples),
        skipped=len(ledger.skipped),
        share_bad=ledger.share_bad,
        reasons=tuple(ledger.reasons()),
        spreads=_spreads(samples, inputs),
        labels=tuple(Counter(sample.label for sample in samples if sample.label).most_common()),
        example_place=first.place,
        example=runs_of(inputs.build(first.messages, first.pictures, open_turn=False), inputs),
        findings=(*_ledger_findings(ledger), *_findings(samples, inputs)),
        faults=found.faults,
        longest=tuple((s.place, s.tokens) for s in sorted(samples, key=lambda s: -s.tokens)[:LONGEST]),
        packing=packing,
        compared=found.compared,
        pictures=found.pictures,
    )


def render_survey(found: Survey, places: int = 3) -> str:
    """Plain text for a terminal or a log. places: how many of each kind of fault are named, 0 for all."""
    lines = [f"{found.path}: {found.samples:,} samples, {found.skipped:,} skipped ({found.share_bad:.1%})", ""]
    lines.append(f"{'':<22}{'min':>9}{'median':>9}{'p95':>9}{'max':>9}{'all':>13}")
    for one in found.spreads:
        numbers = f"{one.minimum:>9,}{one.median:>9,}{one.p95:>9,}{one.maximum:>9,}"
        lines.append(f"{one.name:<22}{numbers}{one.total:>13,}")
    if found.labels:
        some = ", ".join(f"{label} {count}" for label, count in found.labels[:5])
        lines += ["", f"{len(found.labels):,} classes, the most frequent: {some}"]
    lines += ["", f"{found.example_place} as the model sees it; the loss counts what stands in {LEARNED[0]}{LEARNED[1]}:"]
    lines += ["".join(LEARNED[0] + run.text + LEARNED[1] if run.learned else run.text for run in found.example)]
    learned = sum(run.tokens for run in found.example if run.learned)
    lines += [f"({sum(run.tokens for run in found.example):,} tokens, {learned:,} learned)", ""]
    lines += [f"longest: {', '.join(f'{place} with {tokens:,} tokens' for place, tokens in found.longest)}"]
    lines += [] if found.packing is None else [found.packing.told()]
    lines += [f"! {finding}" for finding in found.findings] or ["Nothing wrong was found."]
    told = Preflight(found.faults, found.compared, found.pictures).told(places)
    lines += ["", "Each fault by its place:", *told] if told else []
    if 0 < found.compared < found.pictures:
        lines += [f"{found.compared:,} of {found.pictures:,} pictures were compared in the time of preflight_s"]
    return "\n".join(lines)


def runs_of(one: ModelInput, inputs: Inputs) -> tuple[Run, ...]:
    """Decode what the model will really see, from ids and mask, not from the text that they came from."""
    kinds = list(zip(one.learn.tolist(), one.slots.tolist(), strict=True))
    runs: list[Run] = []
    at = 0
    for (learned, slot), members in groupby(kinds):
        length = len(list(members))
        ids = one.ids[at : at + length].tolist()
        at += length
        text = f"[{length:,} slots]" if slot else inputs.tokenizer.decode(ids, skip_special=False)
        runs.append(Run(text, length, learned))
    return tuple(runs)


def _spreads(samples: Sequence[Sample], inputs: Inputs) -> tuple[Spread, ...]:
    sizes = [size for sample in samples for size in sample.sizes]
    columns = {
        "tokens": [sample.tokens for sample in samples],
        "learned tokens": [sample.learned for sample in samples],
        "turns": [len(sample.messages) for sample in samples],
        "pictures": [len(sample.pictures) for sample in samples],
        "tiles of a picture": [count_tiles(*size, inputs.rule()) for size in sizes],
        "width px": [size.width_px for size in sizes],
        "height px": [size.height_px for size in sizes],
    }
    return tuple(Spread.of(name, values) for name, values in columns.items() if values)


# ---- what is wrong


def _ledger_findings(ledger: Ledger) -> list[str]:
    findings = []
    for kind, count in ledger.reasons():
        place, reason = next(one for one in ledger.skipped if one[1].partition(":")[0] == kind)
        findings.append(f"{count:,} skipped, {kind}: as in {place}{reason.removeprefix(kind)}")
    return findings + ledger.notes


def _findings(samples: Sequence[Sample], inputs: Inputs) -> list[str]:
    found = (_contradictions(samples), _twins(samples), _rare_classes(samples), _one_answer(samples))
    pictures = (_tiny_pictures(samples, inputs), _late_marks(samples), _near_the_limit(samples, inputs))
    return [finding for finding in (*found, *pictures) if finding]


def _contradictions(samples: Sequence[Sample]) -> str:
    said: dict[tuple[object, ...], list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.pictures:
            said[(tuple(str(p.source) for p in sample.pictures), sample.messages[:-1])].append(sample)
    torn = [group for group in said.values() if len({sample.answer for sample in group}) > 1]
    if not torn:
        return ""
    one, other = torn[0][0], next(sample for sample in torn[0] if sample.answer != torn[0][0].answer)
    where = f"{one.place} says {one.answer[:40]!r}, {other.place} says {other.answer[:40]!r}"
    return f"{len(torn):,} times one picture and question have different answers: {where}"


def _twins(samples: Sequence[Sample]) -> str:
    counts = Counter(sample.key for sample in samples)
    extra = sum(count - 1 for count in counts.values())
    if not extra:
        return ""
    key = counts.most_common(1)[0][0]
    places = [sample.place for sample in samples if sample.key == key]
    return f"{extra:,} samples say and show what another one does: {places[0]} and {places[1]}"


def _rare_classes(samples: Sequence[Sample]) -> str:
    counts = Counter(sample.label for sample in samples if sample.label)
    rare = sorted(label for label, count in counts.items() if count < 3)
    if not rare or len(rare) == len(counts):
        return ""
    return f"{len(rare):,} of {len(counts):,} classes have fewer than 3 samples: {', '.join(rare[:5])}"


def _one_answer(samples: Sequence[Sample]) -> str:
    answer, count = Counter(sample.answer for sample in samples).most_common(1)[0]
    if len(samples) < 10 or count < 0.5 * len(samples):
        return ""
    return f"{count:,} of {len(samples):,} samples end in one and the same answer, {answer[:60]!r}: it may be given always"


def _tiny_pictures(samples: Sequence[Sample], inputs: Inputs) -> str:
    side = inputs.config.tile_size_px // 4
    tiny = [sample for sample in samples if any(min(size) < side for size in sample.sizes)]
    if not tiny:
        return ""
    return f"{len(tiny):,} samples show pictures under {side} px, a quarter of a tile: {tiny[0].place}; they are blown up"


def _late_marks(samples: Sequence[Sample]) -> str:
    late = [sample for sample in samples if sample.pictures and not sample.question.startswith((IMAGE_MARK, "Image-1:"))]
    if not late:
        return ""
    return f"{len(late):,} samples speak before they show the picture: {late[0].place}; chat shows it first, so ask in that form"


def _near_the_limit(samples: Sequence[Sample], inputs: Inputs) -> str:
    near = [sample for sample in samples if sample.tokens > 0.9 * inputs.context_tokens]
    if not near:
        return ""
    most = max(near, key=lambda sample: sample.tokens)
    limit = f"the context of {inputs.context_tokens:,} tokens"
    return f"{len(near):,} samples fill over 90 % of {limit}: {most.place} has {most.tokens:,}"
