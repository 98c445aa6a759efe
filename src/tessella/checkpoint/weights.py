"""The tensors of a model folder, mapped or read one at a time, and a writer that holds one tensor or a piece of it at a time.

In: a folder with model.safetensors, or shards and an index.  Out: names, shapes, tensors; nothing is read before asked for.
A mapped tensor (weights[name]) costs no copy, but the pages it touches stay in our memory; a tensor that is read
(weights.read(name)) is a copy that goes when its user lets go of it. Running a model maps, streaming a folder reads.
A tensor that only gets another name, or its rows another order, is not made at all: its bytes pass from file to file in pieces
(weights.strips(name)).
Only safetensors: a pickle of a stranger is never opened.
Source of the format: huggingface/safetensors, README ("Format").
"""

import contextlib
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tessella.checkpoint.streams import NewFile, Span, Strips, is_hollow, pieces, read_into
from tessella.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
LONGEST_HEADER = 10**8  # safetensors' own limit
AHEAD = 4  # pieces that are read before the oldest of them is written: on a busy machine threads come late to their turn
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Weights:
    """The tensors of one folder or file, by name."""

    def __init__(self, files: Sequence[Path]):
        self._handles: dict[str, Any] = {}
        self._begins: dict[str, int] = {}  # where a tensor's bytes begin in its file
        self._stored: dict[str, str] = {}  # its name in the file, where select gave it another
        self._hollow: set[Path] = set()
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for file in files:
            self._add(file)

    def _add(self, file: Path) -> None:
        try:
            handle = safe_open(file, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} is not a whole safetensors file ({_what_is_short(file) or error}); fetch or write it again"
            ) from error
        begins = _begins(file)
        if is_hollow(file):
            self._hollow.add(file)
        for name in handle.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
            if name in self.files:
                raise CheckpointError(
                    f"tensor {name} stands in both {self.files[name].name} and {file.name}; one of them is left over"
                )
            view = handle.get_slice(name)
            if view.get_dtype() not in DTYPES:
                raise CheckpointError(f"{file.name}: {name} is of type {view.get_dtype()}; we read {', '.join(DTYPES)}")
            self._handles[name], self.files[name], self._begins[name] = handle, file, begins[name]
            self.shapes[name], self.dtypes[name] = tuple(view.get_shape()), DTYPES[view.get_dtype()]

    def __getitem__(self, name: str) -> Tensor:
        """A view of the mapped file."""
        return self._handles[name].get_tensor(self._stored.get(name, name))

    def strips(self, name: str) -> Strips:
        """Where the tensor's bytes lie."""
        return Strips((self._span(name),), self.shapes[name][0] if self.shapes[name] else 1)

    def _span(self, name: str) -> Span:
        num_bytes = _count(self.shapes[name]) * self.dtypes[name].itemsize
        return Span(self.files[name], self._begins[name], num_bytes, name, self.files[name] in self._hollow)

    def read(self, name: str) -> Tensor:
        """A copy in memory; nothing of the file stays mapped behind it. Raises CheckpointError when the file ends early."""
        span = self._span(name)
        raw = torch.empty(span.num_bytes, dtype=torch.uint8)
        with span.file.open("rb", buffering=0) as file:
            if read_into(file.fileno(), memory_of(raw), span.begin, span.num_bytes) < span.num_bytes:
                raise CheckpointError(f"{span.file} ends within {name}; it was changed meanwhile: fetch or write it again")
        return raw.view(self.dtypes[name]).reshape(self.shapes[name])

    def select(self, names: Mapping[str, str]) -> "Weights":
        """Some of the tensors under other names: new name -> name here."""
        chosen = Weights([])
        chosen._hollow = self._hollow
        for new, old in names.items():
            chosen._handles[new], chosen._begins[new] = self._handles[old], self._begins[old]
            chosen._stored[new] = self._stored.get(old, old)
            chosen.files[new], chosen.shapes[new], chosen.dtypes[new] = self.files[old], self.shapes[old], self.dtypes[old]
        return chosen

    def num_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(_count(shape) * self.dtypes[name].itemsize for name, shape in self.shapes.items())


def _what_is_short(file: Path) -> str:
    """How far a broken download came, as far as the file's own beginning says; "" where it says nothing."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 + length < LONGEST_HEADER:
                return f"it holds {size:,} bytes and ends within its header"
            rows = json.loads(opened.read(min(length, LONGEST_HEADER)))
        end = 8 + length + max(row["data_offsets"][1] for name, row in rows.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return ""
    return f"it holds {size:,} of {end:,} bytes" if size < end else ""


def _begins(file: Path) -> dict[str, int]:
    """Where each tensor's bytes begin. The header was checked by safetensors itself before."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    return {name: 8 + length + row["data_offsets"][0] for name, row in header.items() if name != "__metadata__"}


def open_weights(folder: Path) -> Weights:
    """The tensors of a model folder. Raises CheckpointError when files are missing, damaged or at odds with the index."""
    if (folder / INDEX).is_file():
        return _open_shards(folder)
    if not (folder / SINGLE).is_file():
        raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}{_what_else(folder)}")
    return Weights([folder / SINGLE])


def _open_shards(folder: Path) -> Weights:
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        planned = {str(name): str(file) for name, file in index.items()}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / INDEX} is no index of shards ({error!r}); fetch it again") from error
    shards = sorted(set(planned.values()))
    for shard in shards:
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise CheckpointError(
                f"{INDEX} names the shard {shard!r}, which is not in {folder}; of {len(shards)} shards that belong there, fetch "
                "those that are missing"
            )
    weights = Weights([folder / shard for shard in shards])
    wrong = [name for name, file in weights.files.items() if planned.get(name) != file.name]
    wrong += [name for name in planned if name not in weights.files]
    if wrong:
        raise CheckpointError(f"{INDEX} and the shards disagree about {some(wrong)}; fetch the folder again")
    return weights


def _what_else(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "; it is an adapter: give it as the adapter, with its base as the model"
    if list(folder.glob("*.bin")) or list(folder.glob("*.pth")):
        return "; it holds pickled weights (.bin, .pth), which we do not open: save them as safetensors"
    return "; fetch the weights again"


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first few names and how many more there are, for a message."""
    listed = ", ".join(list(names)[:limit])
    return listed if len(names) <= limit else f"{listed} and {len(names) - limit} more"


@dataclass(frozen=True)
class Entry:
    """One tensor that is yet to be made and written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]  # called once, when its turn to be written has come
    strips: Strips | None = None  # where exactly these bytes lie already: then they are copied, and nothing is made

    @property
    def num_bytes(self) -> int:
        return _count(self.shape) * self.dtype.itemsize


def entries_of(state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> list[Entry]:
    """Entries of tensors that are there already; dtype None keeps each one's own."""
    return [Entry(name, tuple(tensor.shape), dtype or tensor.dtype, partial(_same, tensor)) for name, tensor in state.items()]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _nothing(_: int) -> None:
    pass


def header_of(entries: Sequence[Entry]) -> tuple[bytes, int]:
    """How a file of those tensors begins -> (its first bytes, how many of tensors follow)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.num_bytes],
        }
        offset += entry.num_bytes
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-(8 + len(head)) % 64)  # the data then begins at a multiple of 64, which mapped reads like
    return len(head).to_bytes(8, "little") + head, offset


def write_file(path: Path, entries: Sequence[Entry], advance: Callable[[int], None] = _nothing) -> str:
    """Write one safetensors file, one tensor in memory at a time, and sync it to the disk. Gives its sha256.

    advance: called with the number of bytes of each piece when its turn to be written has come, for a progress bar.
    """
    head, offset = header_of(entries)
    digest = hashlib.sha256()
    with (
        contextlib.closing(NewFile(path, len(head) + offset)) as file,
        ThreadPoolExecutor(1) as hashing,
        ThreadPoolExecutor(1) as writing,
    ):
        under_way: deque[tuple[Future[None], Future[None]]] = deque()

        def settle(left: int) -> None:
            while len(under_way) > left:
                for done in under_way.popleft():
                    done.result()

        # The next pieces are read, or made, while the last ones are hashed and written; each of the three takes its time.
        with contextlib.closing(pieces(_contents(memoryview(head), entries), stand=AHEAD + 1)) as ready:
            for piece in ready:
                under_way.append((hashing.submit(digest.update, piece), writing.submit(file.write, piece)))
                advance(len(piece))
                settle(AHEAD)
            settle(0)
        file.finish()
    return digest.hexdigest()


def _contents(head: memoryview, entries: Sequence[Entry]) -> Iterator[Span | memoryview]:
    """All bytes of a file, in memory or where they lie."""
    yield head
    for entry in entries:
        if entry.strips is not None:
            assert entry.strips.num_bytes == entry.num_bytes, f"{entry.name}: {entry.strips} for {entry.num_bytes} bytes"
            yield from entry.strips.spans
            continue
        tensor = entry.make().detach().to(device="cpu", dtype=entry.dtype).contiguous()
        assert tuple(tensor.shape) == entry.shape, f"{entry.name}: {tuple(tensor.shape)} made, {entry.shape} promised"
        yield memory_of(tensor)


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor without a copy, seen as uint8 because numpy has no bfloat16."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    if not tensor.numel():
        return memoryview(b"")
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _count(shape: Sequence[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
