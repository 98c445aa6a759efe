"""Which samples a run learns from, written down beside it, so that a resume can tell exactly what has changed since.

In: samples in their order.  Out: one hash of them all; output/samples.tsv.gz with a line each, place and key.
"""

import gzip
import hashlib
from collections.abc import Sequence
from pathlib import Path

from tessella.files import write_whole
from tessella.train.sample import Sample
from tessella.train.streamed import Streamed

FILE = "samples.tsv.gz"
NAMED = 3  # of each kind of change


def hash_of(samples: Sequence[Sample]) -> str:
    """One hash of all samples in order: resume on other data is refused by it."""
    if isinstance(samples, Streamed):
        return samples.digest()
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.key.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()[:16]


def write_list(output: Path, samples: Sequence[Sample]) -> None:
    """Nothing is written of a streamed set. Raises WriteError."""
    if isinstance(samples, Streamed):
        return
    lines = "".join(f"{_flat(sample.place)}\t{_flat(sample.key)}\n" for sample in samples)
    write_whole(output / FILE, gzip.compress(lines.encode("utf-8", "surrogatepass"), 1, mtime=0))


def what_changed(output: Path, samples: Sequence[Sample]) -> str:
    """In words, by file and line: samples that changed, are new, or are gone since write_list()."""
    if isinstance(samples, Streamed):
        return "they are streamed, so it cannot be told which"
    try:
        lines = gzip.decompress((output / FILE).read_bytes()).decode("utf-8", "surrogatepass").splitlines()
    except (OSError, EOFError):
        return f"{FILE} is not there or not whole, so it cannot be told which"
    before = {key: place for place, _, key in (line.rpartition("\t") for line in lines)}
    now = {_flat(sample.key): _flat(sample.place) for sample in samples}
    gone = {place: key for key, place in before.items() if key not in now}
    new = {place: key for key, place in now.items() if key not in before}
    kinds = {
        "changed": [place for place in new if place in gone],
        "new": [place for place in new if place not in gone],
        "gone": [place for place in gone if place not in new],
    }
    told = [f"{len(places):,} {kind}: {_some(places)}" for kind, places in kinds.items() if places]
    if not told:
        told.append(f"the same samples in another order, or another number of times ({len(lines):,} then, {len(samples):,} now)")
    return "; ".join(told)


def _some(places: Sequence[str]) -> str:
    return ", ".join(places[:NAMED]) + (", …" if len(places) > NAMED else "")


def _flat(text: str) -> str:
    return text.replace("\t", " ").replace("\n", " ")
