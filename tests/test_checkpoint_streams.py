"""Bytes pass from file to file unchanged, through the page cache and past it, whatever their places and lengths."""

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from tessella.checkpoint import streams, write
from tessella.checkpoint.convert import Wish, convert
from tessella.checkpoint.folder import sha256_of
from tessella.checkpoint.streams import NewFile, Span, pieces
from tessella.checkpoint.tensor_proof import same_bytes
from tessella.checkpoint.weights import Entry, Weights, entries_of, write_file
from tessella.errors import CheckpointError

LLAMA = "LlamaForCausalLM"


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is large, and a piece is two blocks."""
    monkeypatch.setattr(streams, "LARGE_BYTES", 0)
    monkeypatch.setattr(streams, "PIECE_BYTES", 2 * streams.BLOCK_BYTES)


def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.open

    def opened(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(path, flags, *rest)

    monkeypatch.setattr(streams.os, "open", opened)


def refuse_direct_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(plain: Callable[..., int]) -> Callable[..., int]:
        def called(handle: int, *rest: Any) -> int:
            if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return plain(handle, *rest)

        return called

    monkeypatch.setattr(streams.os, "write", refusing(os.write))
    monkeypatch.setattr(streams.os, "preadv", refusing(os.preadv))


def nothing(_: pytest.MonkeyPatch) -> None:
    pass


@pytest.mark.parametrize(
    "system", [nothing, refuse_direct, refuse_direct_later], ids=["as it is", "without O_DIRECT", "refused when used"]
)
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 8192, 8193, 100_001])
def test_what_is_written_in_odd_pieces_is_read_from_odd_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_pieces: None, size: int, system: Callable[[Any], None]
) -> None:
    system(monkeypatch)
    content = os.urandom(size)
    file = NewFile(tmp_path / "x", size)
    for begin in range(0, size, 3333):
        file.write(memoryview(content[begin : begin + 3333]))
    file.finish()
    file.close()
    assert (tmp_path / "x").read_bytes() == content
    for begin, end in ((0, size), (size // 3, size), (min(7, size), size - size // 5), (size, size)):
        for past_cache in (False, True):
            span = Span(tmp_path / "x", begin, end - begin, "w", past_cache)
            assert b"".join(bytes(piece) for piece in pieces([span], stand=1)) == content[begin:end]


def test_several_readers_may_meet_the_first_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_pieces: None) -> None:
    content = os.urandom(6 * streams.PIECE_BYTES)
    (tmp_path / "x").write_bytes(content)
    meeting = threading.Barrier(streams.READERS)
    plain, met = os.preadv, threading.local()

    def refusing_together(handle: int, *rest: Any) -> int:
        if not hasattr(met, "once"):
            met.once = True
            meeting.wait(timeout=30)
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(handle, *rest)

    monkeypatch.setattr(streams.os, "preadv", refusing_together)
    span = Span(tmp_path / "x", 0, len(content), "w", past_cache=True)
    assert b"".join(bytes(piece) for piece in pieces([span], stand=1)) == content


def test_a_refusal_that_stays_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_pieces: None) -> None:
    def refusing(*_: Any) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    (tmp_path / "x").write_bytes(bytes(100))
    monkeypatch.setattr(streams.os, "preadv", refusing)
    with pytest.raises(OSError, match="Invalid argument"):
        list(pieces([Span(tmp_path / "x", 0, 100, "w", past_cache=True)], stand=1))


@pytest.mark.parametrize("past_cache", [False, True])
def test_a_file_that_ends_within_a_span_is_told(tmp_path: Path, past_cache: bool) -> None:
    (tmp_path / "x").write_bytes(bytes(9000))
    with pytest.raises(CheckpointError, match=r"x ends within w; it was changed meanwhile"):
        list(pieces([Span(tmp_path / "x", 10, 8991, "w", past_cache)], stand=1))


def test_a_file_of_holes_is_read_past_the_page_cache_and_gives_zeros(tmp_path: Path, small_pieces: None) -> None:
    hollow, full = tmp_path / "hollow.safetensors", tmp_path / "full.safetensors"
    for path in (hollow, full):
        save_file({"w": torch.zeros(300_000)}, path)
    head = 8 + int.from_bytes(hollow.read_bytes()[:8], "little")
    os.truncate(hollow, head)
    os.truncate(hollow, full.stat().st_size)
    assert hollow.read_bytes() == full.read_bytes()
    (span,), (other,) = (Weights([path]).strips("w").spans for path in (hollow, full))
    assert span.past_cache and not other.past_cache
    assert not any(any(piece) for piece in pieces([span], stand=1))


def test_a_tensor_that_only_changes_its_name_is_copied_and_never_made(tmp_path: Path, small_pieces: None) -> None:
    state = {f"t{i}": torch.randn(997 * (i + 1)).bfloat16() for i in range(8)}
    save_file(state, tmp_path / "from.safetensors")
    weights = Weights([tmp_path / "from.safetensors"])

    def never() -> torch.Tensor:
        raise AssertionError("made")

    renamed = [Entry(f"new.{n}", weights.shapes[n], weights.dtypes[n], never, weights.strips(n)) for n in sorted(state)]
    made = entries_of({"made": torch.arange(12345.0)})
    seen: list[int] = []
    digest = write_file(tmp_path / "to.safetensors", [*renamed[:4], *made, *renamed[4:]], seen.append)
    found = load_file(tmp_path / "to.safetensors")
    assert digest == sha256_of(tmp_path / "to.safetensors") and len(found) == 9
    assert sum(seen) == (tmp_path / "to.safetensors").stat().st_size
    assert all(torch.equal(found[f"new.{n}"], state[n]) for n in state) and torch.equal(found["made"], torch.arange(12345.0))


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 4093])
def test_each_byte_of_two_pieces_counts(size: int) -> None:
    content = os.urandom(size)
    for shift in (0, 3):  # pieces lie in their rooms at odd places
        assert same_bytes(memoryview(bytes(shift) + content)[shift:], memoryview(content))
    for place in {0, size // 2, size - 2, size - 1} & set(range(size)):
        spoilt = bytearray(content)
        spoilt[place] ^= 1
        assert not same_bytes(memoryview(spoilt), memoryview(content))


@pytest.mark.parametrize("to", ["official", "native"])
def test_one_bit_that_the_disk_turned_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_pieces: None, to: Any
) -> None:
    base = tiny.tiny_folder(tmp_path / "base", LLAMA, dtype=torch.bfloat16)
    assert convert(base, tmp_path / "good", Wish(to=to)).proof.tensors.equal > 30

    def spoilt(path: Path, entries: Any, advance: Any) -> str:
        digest = write_file(path, entries, advance)
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))
        return digest

    monkeypatch.setattr(write, "write_file", spoilt)
    with pytest.raises(CheckpointError, match=r"1 differ: .* differs in 0\.\d% of its numbers"):
        convert(base, tmp_path / "out", Wish(to=to))
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_full_is_no_reason_to_try_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_pieces: None
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = NewFile(tmp_path / "x", 10)
    file.write(memoryview(b"0123456789"))
    monkeypatch.setattr(streams.os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        file.finish()
    file.close()
