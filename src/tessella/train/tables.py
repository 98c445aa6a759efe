"""Datasets whose rows can be fetched by number: JSON lines by their offsets, WebDataset tars, parquet, tables of a hub.

In: a file, a folder of shards, or hf:NAME.  Out: a Table: how many rows, and each as a mapping with its place; embedded pictures
stay where they are (held.py). So a set larger than memory can be taught from: only the rows of the next steps are ever read.
"""

import bisect
import hashlib
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tessella.errors import DataError, TrainingError
from tessella.train.classes import SUFFIXES
from tessella.train.held import Embedded, HubCell, TableCell, TarMember, bytes_of
from tessella.train.readers import row_of_line

SHARDS = (".tar", ".parquet")
KEPT_GROUPS = 4  # row groups of parquet whose rows are at hand
HUB = "hf:"


class Table(Protocol):
    """Rows by number, from 0."""

    in_order: bool  # true where a row is only cheap behind the one before it
    block_rows: int  # rows that lie together and are shuffled among themselves when the set is streamed

    def __len__(self) -> int: ...

    def place(self, number: int) -> str:
        """Where a row stands: "shard.parquet:12"."""
        ...

    def row(self, number: int) -> Any:
        """The row, or a DataError in its place when it cannot be read. Raises TrainingError when the source itself is lost."""
        ...


class Lines:
    """JSON lines. Sixteen bytes of memory a row."""

    in_order, block_rows = False, 4096

    def __init__(self, path: Path):
        self.path = path
        offsets, numbers, at = [], [], 0
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    offsets.append(at)
                    numbers.append(number)
                if number == 1 and line.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
                    raise DataError(f"{path} is one JSON array, which is read whole; to stream it write JSONL, one row a line")
                at += len(line)
        self.offsets, self.numbers = np.array(offsets, dtype=np.int64), np.array(numbers, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.offsets)

    def place(self, number: int) -> str:
        return f"{self.path.name}:{self.numbers[number]}"

    def row(self, number: int) -> Any:
        with self.path.open("rb") as stream:
            stream.seek(int(self.offsets[number]))
            line = stream.readline()
        return row_of_line(line.removeprefix(b"\xef\xbb\xbf"), int(self.numbers[number]))


class Tar:
    """A WebDataset shard: members of one name but for their endings are a row. Its .json is the row, .txt the answer, .cls the
    class; its pictures are the row's unless the .json names them.
    """

    in_order, block_rows = False, 4096

    def __init__(self, path: Path):
        self.path = path
        groups: dict[str, dict[str, TarMember]] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    if member.isfile():
                        stem, _, ending = member.name.rpartition("/")[2].partition(".")
                        key = f"{member.name.rpartition('/')[0]}/{stem}".lstrip("/")
                        held = TarMember(path, member.offset_data, member.size, member.name)
                        groups.setdefault(key, {})[ending.lower()] = held
        except (tarfile.TarError, OSError, EOFError) as error:
            raise DataError(
                f"{path} is packed; unpack it and give the folder: as a plain tar it cannot be read ({error})"
            ) from error
        if not any({"json", "txt", "cls"} & group.keys() for group in groups.values()):
            raise DataError(
                f"{path} is packed; unpack it and give the folder, or the JSON file in it: a WebDataset tar has a .json, .txt or "
                ".cls of the same name beside each picture"
            )
        self.keys, self.groups = list(groups), groups

    def __len__(self) -> int:
        return len(self.keys)

    def place(self, number: int) -> str:
        return f"{self.path.name}:{self.keys[number]}"

    def row(self, number: int) -> Any:
        group = self.groups[self.keys[number]]
        row: dict[str, Any] = {}
        if "json" in group:
            try:
                row = json.loads(group["json"].open().read())
            except (ValueError, RecursionError) as error:
                return DataError(f"broken JSON: {group['json'].name}: {error}")
            if not isinstance(row, dict):
                return row
        for ending in ("txt", "cls"):
            if ending in group:
                text = group[ending].open().read().decode("utf-8", "replace").strip()
                row.setdefault("answer" if ending == "txt" else "class", text)
        shown = {
            held.name.rpartition("/")[2]: held for ending, held in group.items() if f".{ending.rpartition('.')[2]}" in SUFFIXES
        }
        named = row.get("images") or row.get("image") or []
        listed = [named] if isinstance(named, str) else named
        found = [shown.get(name.rpartition("/")[2]) for name in listed if isinstance(name, str)]
        if shown and (not listed or all(found)):
            row = {**row, "image": found or list(shown.values())}
            row.pop("images", None)
        return row


class Parquet:
    """A parquet file; cells {bytes, path} are pictures."""

    in_order = False

    def __init__(self, path: Path):
        try:
            import pyarrow
            import pyarrow.parquet  # the data extra; loaded where parquet is read
        except ImportError as error:
            raise DataError(f"{path}: reading parquet needs pyarrow: pip install 'tessella[data]'") from error
        self.path = path
        try:
            self.file = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path} is no parquet file that can be read: {error}") from error
        meta = self.file.metadata
        self.ends = list(accumulate(meta.row_group(group).num_rows for group in range(meta.num_row_groups)))
        self.block_rows = KEPT_GROUPS * (self.ends[0] if self.ends else 1)
        self.group = lru_cache(maxsize=KEPT_GROUPS + 1)(self._read)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def place(self, number: int) -> str:
        return f"{self.path.name}:{number + 1}"

    def row(self, number: int) -> Any:
        group = bisect.bisect_right(self.ends, number)
        first = self.ends[group - 1] if group else 0
        return self.group(group)[number - first]

    def _read(self, group: int) -> list[dict[str, Any]]:
        """The rows of a group, embedded bytes replaced by where they lie."""
        first = self.ends[group - 1] if group else 0
        rows: list[dict[str, Any]] = []
        for batch in self.file.iter_batches(64, row_groups=[group], use_threads=False):
            for row in batch.to_pylist():
                number = len(rows)

                def cell(column: str, item: int | None, raw: bytes, number: int = number) -> TableCell:
                    digest = hashlib.sha256(raw).hexdigest()[:16]
                    name = f"{self.place(first + number)}/{column}" + ("" if item is None else f"[{item}]")
                    return TableCell(self.path, group, number, column, item, digest, name)

                rows.append(with_cells(row, cell))
        return rows


class CellMaker(Protocol):
    """Makes the Held of an embedded picture."""

    def __call__(self, column: str, item: int | None, raw: bytes) -> Any: ...


def with_cells(row: Mapping[str, Any], make: CellMaker) -> dict[str, Any]:
    """The row with embedded pictures held, and cells that only name a file as that name."""
    return {column: _held(column, value, make) for column, value in row.items()}


def _held(column: str, value: Any, make: CellMaker, item: int | None = None) -> Any:
    if isinstance(value, list) and item is None:
        return [_held(column, one, make, number) for number, one in enumerate(value)]
    raw = bytes_of(value)
    if raw is not None:
        return make(column, item, raw)
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        return value["path"]
    return value


class Hub:
    """hf:NAME, hf:NAME:CONFIG, hf:NAME@SPLIT: a dataset of the Hugging Face hub, or a folder that its `datasets` package reads.

    stream: nothing is kept on the disk; rows come in the hub's order, and going back begins anew.
    Raises DataError: the package is missing, no such dataset, no network.
    """

    def __init__(self, name: str, *, stream: bool = False):
        try:
            import datasets  # large, and no part of an extra; loaded for hf: alone
        except ImportError as error:
            raise DataError(f"{name}: hf:NAME needs the datasets package: pip install datasets") from error
        self.name, self.in_order, self.block_rows = name, stream, 1024
        self.path, _, split = name.removeprefix(HUB).partition("@")
        self.path, _, config = self.path.partition(":")
        try:
            table = datasets.load_dataset(self.path, config or None, split=split or "train", streaming=stream)
            for column, feature in (table.features or {}).items():
                inner = getattr(feature, "feature", feature)  # of a list: what it lists
                if isinstance(inner, datasets.Image):
                    plain = datasets.Image(decode=False)
                    table = table.cast_column(column, plain if inner is feature else type(feature)(plain))
        except (OSError, ValueError, LookupError, ImportError, RuntimeError) as error:  # what datasets and its network raise
            raise DataError(
                f"{name} cannot be read: {type(error).__name__}: {str(error)[:300]}; check name and network"
            ) from error
        self.table, self.count = table, self._count(table, split or "train")
        named = (table.features or {}).items()
        self.classes = {column: feature.names for column, feature in named if isinstance(feature, datasets.ClassLabel)}
        self.rows: Iterator[Any] | None = None
        self.next = 0

    def _count(self, table: Any, split: str) -> int:
        if not self.in_order:
            return len(table)
        told = (table.info.splits or {}).get(split)
        if told is None or not told.num_examples:
            raise DataError(f"{self.name} does not say how many rows it has, so it cannot be streamed; leave --stream out")
        return int(told.num_examples)

    def __len__(self) -> int:
        return self.count

    def place(self, number: int) -> str:
        return f"{self.path}:{number + 1}"

    def row(self, number: int) -> Any:
        def cell(column: str, item: int | None, raw: bytes) -> Any:
            name = f"{self.place(number)}/{column}" + ("" if item is None else f"[{item}]")
            return Embedded(raw, name) if self.in_order else HubCell(self.table, number, column, item, name)

        try:
            row = self._streamed(number) if self.in_order else self.table[number]
            words = {column: names[row[column]] for column, names in self.classes.items() if row[column] is not None}
            return with_cells({**row, **words}, cell)
        except StopIteration:
            return DataError(f"row missing: {self.name} ended before row {number + 1:,}")
        except (OSError, ValueError, LookupError, RuntimeError) as error:  # what datasets and its network raise
            raise TrainingError(
                f"{self.name} broke off at row {number + 1:,}: {type(error).__name__}: {str(error)[:300]}; "
                "when the network is back, go on with the same command and --resume"
            ) from error

    def _streamed(self, number: int) -> Any:
        if self.rows is None or number < self.next:
            self.rows, self.next = iter(self.table.skip(number)), number
        while self.next < number:
            next(self.rows)
            self.next += 1
        self.next += 1
        return next(self.rows)


class Joined:
    """Shards one behind the other."""

    def __init__(self, parts: Sequence[Table]):
        self.parts = parts
        self.ends = list(accumulate(len(part) for part in parts))
        self.in_order = any(part.in_order for part in parts)
        self.block_rows = min((part.block_rows for part in parts), default=1)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def place(self, number: int) -> str:
        part, within = self._at(number)
        return part.place(within)

    def row(self, number: int) -> Any:
        part, within = self._at(number)
        return part.row(within)

    def part_of(self, number: int) -> int:
        """Which part a row stands in."""
        return bisect.bisect_right(self.ends, number)

    def _at(self, number: int) -> tuple[Table, int]:
        part = self.part_of(number)
        return self.parts[part], number - (self.ends[part - 1] if part else 0)


def is_hub(path: Path | str) -> bool:
    """True for hf:NAME."""
    return str(path).startswith(HUB)


def shards_in(folder: Path) -> list[Path]:
    """The shards of a folder that holds nothing else to learn from, in the order of their names."""
    shards = sorted(path for path in folder.iterdir() if path.suffix.lower() in SHARDS and path.is_file())
    apart = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return [] if apart else shards


def open_table(path: Path, *, stream: bool = False) -> Table | None:
    """The table that a path is; None for what is read otherwise (arrays of JSON, folders of pictures, JSONL unless streamed).

    Raises DataError when it is one and cannot be read.
    """
    if is_hub(path):
        return Hub(str(path), stream=stream)
    if path.is_dir():
        shards = shards_in(path)
        return Joined([_shard(shard) for shard in shards]) if shards else None
    if path.suffix.lower() in SHARDS:
        return _shard(path)
    return Lines(path) if stream else None


def _shard(path: Path) -> Table:
    return Tar(path) if path.suffix.lower() == ".tar" else Parquet(path)
