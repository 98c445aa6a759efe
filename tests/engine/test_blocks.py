"""The block book by random walks: no block owned twice, none lost, and what is found is what was put there."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tessella.engine.blocks import BlockBook, next_key

COUNT = 6
KEYS = [bytes([i]) for i in range(8)]


class Walk(RuleBasedStateMachine):
    """rows: the blocks that each row holds. content: the key of what a block holds, as far as anybody was told."""

    def __init__(self) -> None:
        super().__init__()
        self.book = BlockBook(COUNT)
        self.rows: list[list[int]] = []
        self.content: dict[int, bytes] = {}

    def held(self) -> set[int]:
        return {block for row in self.rows for block in row}

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=3))
    def join(self, keys: list[bytes]) -> None:
        found = self.book.find(keys)
        assert [self.content[block] for block in found] == keys[: len(found)]
        assert len(found) == len(keys) or keys[len(found)] not in self.content.values()
        self.book.take(found)
        self.rows.append(found)

    @precondition(lambda self: self.rows and self.book.available)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        block = self.book.new()
        assert block not in self.held()
        self.content.pop(block, None)
        data.draw(st.sampled_from(self.rows)).append(block)

    @precondition(lambda self: self.held())
    @rule(data=st.data(), key=st.sampled_from(KEYS))
    def publish(self, data: st.DataObject, key: bytes) -> None:
        block = data.draw(st.sampled_from(sorted(self.held())))
        self.book.publish(block, key)
        if block not in self.content and key not in self.content.values():
            self.content[block] = key

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(range(len(self.rows))))
        self.book.release(self.rows.pop(row))

    @invariant()
    def no_block_is_lost_or_given_out_twice(self) -> None:
        assert self.book.available == COUNT - len(self.held())

    @invariant()
    def what_was_published_is_found_until_its_block_is_given_away(self) -> None:
        assert {key: self.book.find([key]) for key in KEYS} == {
            key: [block for block, there in self.content.items() if there == key] for key in KEYS
        }
        assert self.book.idle == len(self.content.keys() - self.held())


Walk.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestWalk = Walk.TestCase


def test_the_longest_unused_block_is_given_away_first_and_a_rows_end_before_its_beginning() -> None:
    book = BlockBook(3)
    row = [book.new() for _ in range(3)]
    for block, key in zip(row, KEYS, strict=False):
        book.publish(block, key)
    book.release(row)
    assert book.new() == row[2] and book.find(KEYS[:3]) == row[:2]
    book.take(row[:1])
    book.release(row[:1])  # used again, so the youngest now
    assert book.new() == row[1] and book.find(KEYS[:1]) == row[:1]


def test_a_key_tells_ids_pictures_and_what_came_before_apart() -> None:
    keys = [
        next_key(b"", [1, 2], []),
        next_key(b"", [1, 3], []),
        next_key(b"", [2, 1], []),
        next_key(b"0", [1, 2], []),
        next_key(b"", [1, 2], ["red"]),
        next_key(b"", [1, 2], ["blue"]),
    ]
    assert len(set(keys)) == len(keys) and keys[0] == next_key(b"", [1, 2], [])
