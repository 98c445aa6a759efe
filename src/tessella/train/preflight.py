"""What is wrong with a run's data, each fault by its kind, file and line, before the run begins.

In: a recipe's data as it was read.  Out: Faults; and notes for the run's ledger.
Faults of rows (broken, over-long, …) come from reading; here are those that only many rows together show: the same picture and
question twice, different answers to one question, pictures that stand on both sides of the split.  The pictures themselves are
compared within a time; what it does not allow is told.
"""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tessella.chat import IMAGE_MARK
from tessella.image import Source
from tessella.train.dataset import Ledger, RecipeData
from tessella.train.fingerprints import Fingerprint, Known, fingerprints
from tessella.train.sample import Sample


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong, in one place."""

    kind: str
    place: str
    detail: str = ""
    skipped: bool = False  # true for a sample that is not used because of it


@dataclass(frozen=True)
class Preflight:
    """All faults, those of rows first."""

    faults: tuple[Fault, ...]
    compared: int  # pictures that were looked at
    pictures: int  # distinct ones

    def counts(self) -> dict[str, int]:
        """Kinds and how often, the most frequent first."""
        return dict(Counter(fault.kind for fault in self.faults).most_common())

    def told(self, most: int) -> list[str]:
        """A line for each kind, below it its first places (0: all of them)."""
        lines = []
        for kind, count in self.counts().items():
            some = [fault for fault in self.faults if fault.kind == kind]
            lines.append(f"{count:,} x {kind}{', skipped' if some[0].skipped else ''}")
            shown = some[: most or None]
            lines += [f"    {fault.place}{': ' if fault.detail else ''}{fault.detail}" for fault in shown]
            if len(shown) < count:
                lines.append(f"    and {count - len(shown):,} more (--places 0 names all)")
        return lines

    def notes(self) -> list[str]:
        """A line for each kind that is used nevertheless, for a run's ledger; reading tells of leaks itself."""
        out = []
        for kind, count in Counter(fault.kind for fault in self.faults if not fault.skipped and fault.kind != "leak").items():
            first = next(fault for fault in self.faults if fault.kind == kind)
            out.append(f"{count:,} x {kind}, as in {first.place}{': ' if first.detail else ''}{first.detail}")
        if self.compared < self.pictures:
            out.append(f"{self.compared:,} of {self.pictures:,} pictures were compared in the time of --preflight-s")
        return out


def look(data: RecipeData, seconds: float, limit_megapixels: float) -> Preflight:
    """Everything that is wrong with a recipe's data. seconds: for comparing pictures; 0 leaves that out."""
    train = [sample for sample in data.train if "#" not in sample.key]  # not the copies that repeat makes
    held_out = list(data.held_out)
    sides = (held_out, train)
    sources = [picture.source for samples in sides for sample in samples for picture in sample.pictures]
    deadline = time.monotonic() + seconds
    seen = fingerprints(sources, 0.75 * seconds, limit_megapixels) if seconds else {}
    alike = _alike(seen, deadline)
    faults = _of_ledger(data.ledger)
    faults += _leaks(train, held_out, alike)
    for samples in sides:
        faults += _twins(samples, alike)
    faults += _bare(train)
    return Preflight(tuple(faults), len(seen), len(set(sources)))


def _of_ledger(ledger: Ledger) -> list[Fault]:
    parted = [(place, *reason.partition(":")) for place, reason in ledger.skipped]
    return [Fault(kind, place, detail.strip(), skipped=True) for place, kind, _, detail in parted]


def _alike(seen: dict[Source, Fingerprint], deadline: float) -> dict[Source, Source]:
    """Each picture -> the first one that shows the same."""
    known = Known(seen)
    first: dict[Source, Source] = {}
    for source, one in seen.items():
        if source in first:
            continue
        if time.monotonic() > deadline:
            break
        for other in known.same_as(one):
            first.setdefault(other, source)
        first[source] = source
    return first


def _shown(sample: Sample, alike: dict[Source, Source]) -> tuple[str, ...]:
    """What a sample's pictures are, whatever they are called."""
    return tuple(str(alike.get(picture.source, picture.source)) for picture in sample.pictures)


def _twins(samples: Sequence[Sample], alike: dict[Source, Source]) -> list[Fault]:
    """Samples that show and ask what an earlier one does; with another answer they contradict it."""
    said: dict[tuple[object, ...], Sample] = {}
    faults = []
    for sample in samples:
        key = (_shown(sample, alike), sample.messages[:-1])
        earlier = said.setdefault(key, sample)
        if earlier is sample:
            continue
        if earlier.answer == sample.answer:
            faults.append(Fault("duplicate", sample.place, f"the same picture, question and answer as {earlier.place}"))
        elif sample.pictures:
            words = f"{sample.answer[:40]!r} where {earlier.place} says {earlier.answer[:40]!r}"
            faults.append(Fault("contradiction", sample.place, words))
    return faults


def _leaks(train: Sequence[Sample], held_out: Sequence[Sample], alike: dict[Source, Source]) -> list[Fault]:
    """Held-out samples whose pictures are trained on: their score would praise memory."""
    taught: dict[str, str] = {}
    named: dict[str, str] = {}
    for sample in train:
        for picture in sample.pictures:
            named.setdefault(str(picture.source), sample.place)
            taught.setdefault(str(alike.get(picture.source, picture.source)), sample.place)
    faults = []
    for sample in held_out:
        for picture, shown in zip(sample.pictures, _shown(sample, alike), strict=True):
            if str(picture.source) in named:
                faults.append(Fault("leak", sample.place, f"held out, but {named[str(picture.source)]} trains on its picture"))
                break
            if shown in taught:
                faults.append(
                    Fault("leak by looks", sample.place, f"held out, but {taught[shown]} trains on a picture that looks the same")
                )
                break
    return faults


def _bare(samples: Iterable[Sample]) -> list[Fault]:
    """Samples that ask nothing: the model is only shown a picture."""
    return [
        Fault("no question", sample.place, "the user's turn holds a picture and no word")
        for sample in samples
        if sample.pictures and not sample.question.replace(IMAGE_MARK, "").strip()
    ]
