"""One request inside the engine: its tokens, what of them is computed, the blocks it holds.

In: Request.  Out: what the scheduler plans with and the runner runs.
"""

from collections.abc import Sequence
from functools import cached_property

from tessella.engine.answer import Answer
from tessella.engine.blocks import next_key
from tessella.engine.lora import Adapter
from tessella.engine.request import OnPiece, Request
from tessella.engine.vision import View, ViewKey


class Row:
    """total: tokens of prompt and longest answer, fixed at the start: all of a row's angles hang on it, as in generate.py.

    stretched: whether RoPE then turns by other angles than those of the trained length. number: of arrival, set at submit.
    """

    def __init__(
        self,
        request: Request,
        answer: Answer,
        on_piece: OnPiece,
        adapter: Adapter | None,
        *,
        block_tokens: int,
        views: Sequence[View],
        unstretched_tokens: int,
    ):
        self.request = request
        self.answer = answer
        self.on_piece = on_piece
        self.adapter = adapter
        self.adapter_number = 0 if adapter is None else adapter.number
        self.number = 0
        self.total = len(request.prompt) + request.params.max_tokens
        self.stretched = self.total > unstretched_tokens
        self.prompt_ids: list[int] = request.prompt.ids.tolist()
        self.tokens = list(self.prompt_ids)  # and the answer
        self.pending = 0  # ids that are drawn but not known yet; they stand behind the tokens
        self.place = 0  # of the newest such id among those of the step that drew it
        self.computed = 0  # tokens whose keys and values lie in the blocks, or will when the steps that run are over
        self.blocks: list[int] = []
        self.published = 0  # blocks that were given their key, or came with it
        self.runs = False  # is among the scheduler's running rows
        self.was_admitted = False
        self._block_tokens = block_tokens
        self.views = views
        self._keys: list[bytes] = []
        self.key(len(self.tokens) // block_tokens - 1)  # made here, in the thread of whoever submits

    @cached_property
    def takes_the_likeliest(self) -> bool:
        """Whether the next id is the likeliest and nothing else is asked of it."""
        request = self.request
        plain = request.params.temperature == 0 and not request.params.penalises
        return plain and request.mask is None and request.logprobs is None

    @cached_property
    def waits_for_its_ids(self) -> bool:
        """Whether a step must wait for the ids of the one before: something on the host hangs on them, or on the logits."""
        request = self.request
        return request.mask is not None or request.params.penalises or request.logprobs is not None

    @property
    def length(self) -> int:
        """Tokens, known or not."""
        return len(self.tokens) + self.pending

    @property
    def missing(self) -> int:
        """Tokens that are still to be computed before the next id can be drawn."""
        return self.length - self.computed

    @property
    def is_full(self) -> bool:
        """Whether the answer has all its ids, though some may not be known yet."""
        return len(self.answer.ids) + self.pending >= self.request.params.max_tokens

    @property
    def sight(self) -> int:
        return self.adapter.number if self.adapter is not None and self.adapter.sees else 0

    @cached_property
    def slot_places(self) -> list[int]:
        """Where the slots stand in the prompt, all views in order."""
        places: list[int] = self.request.prompt.slots.nonzero()[:, 0].tolist()
        return places

    @cached_property
    def view_ranges(self) -> list[tuple[int, int]]:
        """First slot and end of the last slot of each view."""
        ranges, at = [], 0
        for view in self.views:
            ranges.append((self.slot_places[at], self.slot_places[at + view.slots - 1] + 1))
            at += view.slots
        return ranges

    def views_in(self, start: int, end: int) -> list[int]:
        """Views with a slot in tokens start <= i < end."""
        return [view for view, (first, last) in enumerate(self.view_ranges) if first < end and last > start]

    def view_key(self, view: int) -> ViewKey:
        return ViewKey(self.sight, self.views[view].digest)

    def key(self, block: int) -> bytes:
        """The key of a full block; b"" for block -1, which all rows of one adapter and one RoPE share."""
        size = self._block_tokens
        while len(self._keys) <= block:
            start = len(self._keys) * size
            ids = self.tokens[start : start + size]
            assert len(ids) == size, "only full blocks have keys"
            before = self._keys[-1] if self._keys else self._root()
            self._keys.append(next_key(before, ids, [self.views[view].digest for view in self.views_in(start, start + size)]))
        return self._keys[block] if block >= 0 else b""

    def _root(self) -> bytes:
        """What else the cached keys and values hang on."""
        return f"{self.adapter_number} {self.total if self.stretched else 0}".encode()

    def prompt_keys(self) -> list[bytes]:
        """Keys of the blocks that may be found in the cache: all full ones, but the last token must be computed."""
        full = (len(self.tokens) - 1) // self._block_tokens
        self.key(full - 1)
        return self._keys[:full]

    def next_shareable_key(self) -> bytes | None:
        """The key of the block that this row computes next, if that block will be full."""
        block = self.computed // self._block_tokens
        return self.key(block) if (block + 1) * self._block_tokens <= len(self.tokens) else None
