"""What goes into the engine and what comes out: the only file of this room that a server needs to know, beside engine.py.

In: Request.  Out: Pieces, one or more, the last with a finish and a Usage.
V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from tessella.errors import ConfigError
from tessella.inputs import ModelInput
from tessella.sampling import SamplingParams

Finish = Literal["stop", "length", "cancelled", "error"]


class Mask(Protocol):
    """Which ids may come next, for answers that must follow a grammar. The engine's thread alone calls it; it must be quick.

    It raises TessellaError when it cannot go on: that one answer then ends with "error". After the end of the grammar it must
    allow a stop id and nothing else.
    """

    def fill(self, bits: Tensor) -> None:
        """bits (ceil(V / 32),) int32 on the CPU, to be overwritten: bit i of word w is 1 where the id 32 * w + i is allowed."""
        ...

    def accept(self, token_id: int) -> None:
        """The id that was drawn; not called for a stop id, with which the answer ends."""
        ...


class LowRank(Protocol):
    """One layer's change: W x becomes W x + scale * B (A x). checkpoint's pairs are such."""

    @property
    def a(self) -> Tensor:
        """(rank, width in)"""
        ...

    @property
    def b(self) -> Tensor:
        """(width out, rank)"""
        ...

    @property
    def scale(self) -> float: ...


@dataclass(frozen=True, eq=False)
class Request:
    """One answer to one prompt. Several answers to one prompt are several requests: they share its cache blocks."""

    prompt: ModelInput
    params: SamplingParams
    stop_ids: tuple[int, ...]  # end the answer and are not given out
    adapter: str | None = None  # a name given to Engine.load_adapter
    logprobs: int | None = None  # None: none; n: of each drawn id and of the n likeliest, in [0, 20]
    mask: Mask | None = None

    def __post_init__(self) -> None:
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise ConfigError(f"logprobs is {self.logprobs}, must be in [0, {MOST_LOGPROBS}], or none")


MOST_LOGPROBS = 20


@dataclass(frozen=True)
class Logprob:
    """Of one drawn id: natural logarithms of the model's own probabilities, before temperature, penalties and filters."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the likeliest ids with theirs, likeliest first


@dataclass(frozen=True)
class Usage:
    """What one answer took."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, not computed again
    answer_tokens: int  # the stop id not counted
    tiles: int
    seconds_to_first_token: float | None  # from submit; None when there was none


@dataclass(frozen=True)
class Piece:
    """A part of an answer, at most one a step.

    text is whole characters, and what may yet become a stop string is held back; so ids may be ahead of the text, and a
    piece may have ids but no text. With a finish nothing is held back any more, and no piece comes after it.
    """

    text: str = ""
    ids: tuple[int, ...] = ()  # drawn since the last piece
    logprobs: tuple[Logprob, ...] = ()  # one for each of ids, when they were asked for
    finish: Finish | None = None
    error: str | None = None  # with finish "error": a sentence for a person
    usage: Usage | None = None  # with any finish
    shown: tuple[Mapping[str, Any], ...] = ()  # with a finish, of a routed model: what its routing tokens gave (docs/boxes.md)


OnPiece = Callable[[Piece], None]  # called in the engine's thread: must be quick and must not raise


class Ticket(Protocol):
    """What submit gives back. Thread-safe."""

    def cancel(self) -> None:
        """Ends the answer within one step with finish "cancelled"; does nothing when it has ended."""
        ...


@dataclass(frozen=True)
class EngineSettings:
    """How much the engine takes at once. Numbers that are None fit the device: see Engine."""

    block_tokens: int | None = None  # tokens that a cache block holds
    cache_tokens: int | None = None  # tokens in all blocks together; None: by cache_fraction of the free memory
    cache_fraction: float = 0.5  # share of the device's free memory that the blocks may take, in (0, 1]
    max_batch_tokens: int | None = None  # tokens of one step; a longer prompt runs in pieces
    max_batch_tiles: int | None = None  # tiles that one step sees; more wait for the next
    max_running: int | None = None  # answers that grow side by side
    max_waiting: int = 512  # requests that wait; one more is refused with QueueFull
    vision_cache_bytes: int = 256 * 2**20  # visual tokens kept by tile, for all requests
    run_ahead: bool | None = None  # launch a step before the ids of the last are known; None: on a GPU
    cuda_graphs: bool = True  # decode through captured graphs on a GPU
    kernels: bool = True  # on a GPU in 16-bit types: joined products and our kernels between them; false also means no graphs
    own_prompts: bool = True  # prompts look back through our kernel, instead of torch's packed one
    own_products: bool = True  # one row alone: our kernels for its products too, instead of cuBLAS

    def __post_init__(self) -> None:
        for name, value, legal, range_ in (
            ("block_tokens", self.block_tokens, self.block_tokens != 0, "at least 1, or none"),
            ("cache_tokens", self.cache_tokens, self.cache_tokens != 0, "at least 1, or none"),
            ("cache_fraction", self.cache_fraction, 0 < self.cache_fraction <= 1, "in (0, 1]"),
            ("max_batch_tokens", self.max_batch_tokens, self.max_batch_tokens != 0, "at least 1, or none"),
            ("max_batch_tiles", self.max_batch_tiles, self.max_batch_tiles != 0, "at least 1, or none"),
            ("max_running", self.max_running, self.max_running != 0, "at least 1, or none"),
            ("max_waiting", self.max_waiting, self.max_waiting >= 1, "at least 1"),
            ("vision_cache_bytes", self.vision_cache_bytes, self.vision_cache_bytes >= 0, "0 or more"),
        ):
            if not legal or (value is not None and value < 0):
                raise ConfigError(f"{name} is {value}, must be {range_}")


@dataclass(frozen=True)
class EngineState:
    """A snapshot. Gauges tell of now, counters of the time since the start."""

    # gauges
    alive: bool  # the engine's thread runs; false before start, after stop and after a failure
    draining: bool  # stop was called: what runs is ended, nothing new is taken
    failure: str | None  # what ended the thread, when it was a fault of ours
    waiting: int  # requests
    running: int
    blocks: int  # of the cache, all of them
    blocks_used: int  # held by answers that run
    blocks_cached: int  # held by none, kept for prompts that begin alike
    vision_bytes: int
    adapters: tuple[str, ...]
    # counters
    steps: int = 0
    submitted: int = 0
    stopped: int = 0  # answers that ended with each finish
    length: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0  # of admitted requests
    cached_tokens: int = 0  # of these, found in the cache
    computed_tokens: int = 0  # run through the decoder, prompts and answers
    answer_tokens: int = 0
    preemptions: int = 0
    tiles: int = 0  # run through the tower
    tiles_cached: int = 0  # found in the vision cache instead
