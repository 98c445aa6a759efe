"""Who runs next: rows join, grow, are put back and leave, a step at a time. No tensor is touched here.

In: rows.  Out: Batch, what one step runs: some tokens of some rows, and tiles to be seen before.
Rows that grow come first, one token each; what is left of the budget goes to prompts, in pieces, in order of arrival. When
blocks run out the row that came last gives its own back and waits at the front; the row that came first always goes on.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tessella.engine.blocks import BlockBook
from tessella.engine.row import Row
from tessella.engine.vision import ViewKey, VisionCache


class Part(NamedTuple):
    """Tokens start <= i < end of a row are run."""

    row: Row
    start: int
    end: int

    @property
    def draws(self) -> bool:
        """Whether the row's next id is drawn after it."""
        return self.end == self.row.length


@dataclass
class Batch:
    """The work of one step. Parts of one token that draw stand in front."""

    parts: list[Part] = field(default_factory=list)
    views: dict[ViewKey, tuple[Row, int]] = field(default_factory=dict)  # to be seen: a row that has it, and its number there

    @property
    def tiles(self) -> int:
        """Tiles of the views that are to be seen."""
        return sum(row.views[view].tiles for row, view in self.views.values())

    @property
    def drawing(self) -> list[Row]:
        """Rows that draw their next id after this step, in the order of the parts."""
        return [part.row for part in self.parts if part.draws]


class Coming:
    """What the running rows have coming to them.

    keys: of the blocks that prompts compute next; who needs the same waits a step and finds them. room: blocks that nobody was
    promised. A block that a running row takes was promised to it, so room stays.
    """

    def __init__(self, running: Sequence[Row], room: int):
        self.keys: set[bytes] = set()
        self.room = room
        for row in running:
            self.add(row)

    def add(self, row: Row) -> None:
        if row.missing > 1 and (key := row.next_shareable_key()) is not None:
            self.keys.add(key)


@dataclass
class Counters:
    """Since the start."""

    admitted: int = 0  # rows
    prompt_tokens: int = 0  # of theirs
    cached_tokens: int = 0
    computed_tokens: int = 0
    preemptions: int = 0
    tiles: int = 0
    tiles_cached: int = 0


class Scheduler:
    """max_tokens, max_tiles: of one step; max_running: rows side by side."""

    def __init__(
        self, book: BlockBook, seen: VisionCache, *, block_tokens: int, max_tokens: int, max_tiles: int, max_running: int
    ):
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []  # in order of arrival
        self.counters = Counters()
        self._book = book
        self._seen = seen
        self._block_tokens = block_tokens
        self._max_tokens = max_tokens
        self._max_tiles = max_tiles
        self._max_running = max_running

    def add(self, row: Row) -> None:
        self.waiting.append(row)

    def remove(self, row: Row) -> None:
        """The row has ended; its full blocks can still be found by others."""
        if row.runs:
            self._publish(row)
            self.running.remove(row)
            self._give_back(row)
        else:
            self.waiting.remove(row)

    def next_batch(self) -> Batch | None:
        """What to run now; None when there is nothing, or nothing before the ids that are on their way have come."""
        while self.running or self.waiting:
            batch = self._plan()
            if batch.parts:
                return batch
            if any(row.pending for row in (*self.running, *self.waiting)):
                return None  # what runs must end first
            assert self.running, "nothing runs, and the first of the waiting does not fit into an empty cache"
            self._preempt(self.running[-1])  # prompts block each other: the last one makes room
        return None

    def done(self, batch: Batch) -> None:
        """The batch was launched: for all that is launched after it its tokens are computed, its full blocks can be shared."""
        for row, _, end in batch.parts:
            self.counters.computed_tokens += end - row.computed
            row.computed = end
            self._publish(row)
        self.counters.tiles += batch.tiles

    def _publish(self, row: Row) -> None:
        """Blocks whose tokens are computed and known can be found from now on."""
        full = min(row.computed, len(row.tokens)) // self._block_tokens
        for block in range(row.published, full):
            self._book.publish(row.blocks[block], row.key(block))
        row.published = max(row.published, full)

    def _plan(self) -> Batch:
        batch, budget = Batch(), self._max_tokens
        for row in [row for row in self.running if row.missing == 1 and not row.is_full][:budget]:
            if row.runs and self._grow(row, row.computed + 1):  # it may have been put back for an earlier one
                batch.parts.append(Part(row, row.computed, row.computed + 1))
        budget -= len(batch.parts)
        for row in [row for row in self.running if row.missing > 1]:
            budget -= self._add_prompt(batch, row, budget)
        if self.waiting:
            coming = Coming(self.running, self._book.available - self._promised())
            while budget > 0 and (new := self._admit(coming)) is not None:
                budget -= self._add_prompt(batch, new, budget)
        batch.parts.sort(key=lambda part: (part.end - part.start > 1, part.row.adapter_number))
        return batch

    def _grow(self, row: Row, tokens: int) -> bool:
        """Blocks for that many tokens of a row, taken from later rows when none is free; false when the row itself had to go."""
        while len(row.blocks) * self._block_tokens < tokens:
            if self._book.available:
                row.blocks.append(self._book.new())
                continue
            last = self.running[-1]
            self._preempt(last)
            if last is row:
                return False
        return True

    def _add_prompt(self, batch: Batch, row: Row, budget: int) -> int:
        """Put the next piece of a prompt into the batch; gives the number of its tokens."""
        room = (len(row.blocks) + self._book.available) * self._block_tokens
        end = self._seen_until(batch, row, min(len(row.tokens), row.computed + budget, room))
        if end <= row.computed:
            return 0
        grown = self._grow(row, end)
        assert grown, "a prompt takes no block from others"
        part = Part(row, row.computed, end)
        batch.parts.append(part)
        return end - part.start

    def _seen_until(self, batch: Batch, row: Row, end: int) -> int:
        """How far the row can be run: to end, or to the first view that this step cannot see any more.

        A view of more tiles than a step may see is seen by itself.
        """
        for view in row.views_in(row.computed, end):
            key, first, tiles = row.view_key(view), row.view_ranges[view][0], row.views[view].tiles
            if key in batch.views or key in self._seen:
                self.counters.tiles_cached += tiles * (row.computed <= first)
            elif not batch.views or batch.tiles + tiles <= self._max_tiles:
                batch.views[key] = (row, view)
            else:
                return max(row.computed, first)
        return end

    def _admit(self, coming: Coming) -> Row | None:
        """The next of the waiting that has room, with the blocks that it finds; it is running then."""
        if len(self.running) >= self._max_running:
            return None
        for row in self.waiting:
            if row.pending:
                return None  # it was put back with an id on its way
            keys = row.prompt_keys()
            found = self._book.find(keys)
            if len(found) < len(keys) and keys[len(found)] in coming.keys:
                continue  # another row is computing just that: the next step finds it
            idle = sum(self._book.is_idle(block) for block in found)
            need = -(-len(row.tokens) // self._block_tokens) - len(found)
            if self.running and need > coming.room - idle:
                return None  # nobody overtakes the one that waits for room
            coming.room -= idle + row.length // self._block_tokens + 1 - len(found)
            self._join(row, found)
            coming.add(row)
            return row
        return None

    def _promised(self) -> int:
        """Blocks that running rows still need for the tokens that they have, and one each to grow."""
        return sum(max(0, row.length // self._block_tokens + 1 - len(row.blocks)) for row in self.running)

    def _join(self, row: Row, found: Sequence[int]) -> None:
        self.waiting.remove(row)
        row.runs = True
        self._book.take(found)
        row.blocks = list(found)
        row.published = len(found)
        row.computed = len(found) * self._block_tokens
        place = next((i for i, other in enumerate(self.running) if other.number > row.number), len(self.running))
        self.running.insert(place, row)
        if not row.was_admitted:
            row.was_admitted = True
            row.answer.cached_tokens = row.computed
            self.counters.admitted += 1
            self.counters.prompt_tokens += len(row.prompt_ids)
            self.counters.cached_tokens += row.computed

    def _preempt(self, row: Row) -> None:
        """Put a row back to the front of the waiting; it is computed again, but for what it finds in the cache then."""
        self.running.remove(row)
        self._give_back(row)
        self.waiting.appendleft(row)
        self.counters.preemptions += 1

    def _give_back(self, row: Row) -> None:
        self._book.release(row.blocks)
        row.blocks, row.computed, row.published, row.runs = [], 0, 0, False
