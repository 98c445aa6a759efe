"""Messages with pictures become what the model eats; the one door for training, talking and scoring.

In: messages with an <image> mark for each picture, and the pictures.  Out: ModelInput.
T tokens, N tiles of all pictures, S side of a tile in pixels.
Slots per tile: config.slots_per_tile; (tile size / patch / 2) squared = 256 at 448 px for InternVL. Where the tile rule pads a
grid, a picture has the slots of its whole view and of its window. Nothing is ever cut to fit: too long is an error.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from tessella.chat import IMAGE_MARK, Message, Piece, count_marks, render, template_named
from tessella.config import ModelConfig
from tessella.errors import CheckpointError, ConfigError, ContextError, PromptError
from tessella.geometry import Grid, Size, Window
from tessella.image import (
    LIMIT_MEGAPIXELS,
    MOST_TILES,
    Source,
    TileRule,
    Tiles,
    count_tiles,
    cut_tiles,
    open_image,
    picture_window,
    read_size,
)
from tessella.tokenizer import Tokenizer
from tessella.wordpiece import QuestionTokenizer

REMEMBERED = 1 << 16  # texts whose token counts are at hand


@dataclass(frozen=True)
class Picture:
    """A picture to show; max_tiles overrides the limit for this one, thumbnail not counted."""

    source: Source
    max_tiles: int | None = None


@dataclass(frozen=True, eq=False)
class ModelInput:
    """One prompt. Slots come in the order of the tiles, row by row, thumbnail last, picture after picture; or with windows in
    that of each picture's whole view and its window.
    """

    ids: Tensor  # (T,) int64
    learn: Tensor  # (T,) bool, true on tokens that the loss counts
    slots: Tensor  # (T,) bool, true where a visual token goes
    tiles: Tensor  # (N, 3, S, S) uint8
    tiles_per_picture: tuple[int, ...]
    digests: tuple[str, ...]  # of each tile's pixels: all slots bear one id, so a cache must tell pictures apart by these
    windows: tuple[Window, ...] = ()  # of each picture, where the tile rule pads a grid
    questions: tuple[tuple[int, ...], ...] = ()  # of each tile, where the connector reads them: ids of the turn it is shown in
    queries: Tensor | None = None  # (T,) int64: which super-link query stands here, else -1; None where there is none

    def __post_init__(self) -> None:
        assert len(self.digests) == len(self.tiles), "each tile has a digest"
        assert len(self.questions) in (0, len(self.tiles)), "each tile has a question, or none has"

    def __len__(self) -> int:
        return self.ids.shape[0]


class Lengths(NamedTuple):
    """What a sample costs, known from its text and the headers of its pictures."""

    tokens: int
    learned: int  # of them
    tiles: int


class Inputs:
    """Makes the inputs of one model. Special ids come from its tokenizer, by name.

    max_tiles, context_tokens, system: the checkpoint's own where None. Raises CheckpointError when the tokenizer lacks a
    special token or has more tokens than the model has rows, ConfigError for an unknown template or a limit out of range.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        *,
        max_tiles: int | None = None,
        context_tokens: int | None = None,
        system: str | None = None,
        limit_megapixels: float = LIMIT_MEGAPIXELS,
        questions: QuestionTokenizer | None = None,
    ):
        """questions: of a connector that reads them (config.reads_question)."""
        assert config.reads_question == (questions is not None), "a connector that reads questions needs their tokenizer"
        self.config, self.questions = config, questions
        self.tokenizer = tokenizer
        self.template = template_named(config.template)
        self.max_tiles = config.max_tiles if max_tiles is None else max_tiles
        self.context_tokens = config.context_tokens if context_tokens is None else context_tokens
        self.system = system
        self.limit_megapixels = limit_megapixels
        if self.context_tokens < 1:
            raise ConfigError(f"context_tokens is {self.context_tokens}, must be at least 1")
        if tokenizer.vocab_size > config.language.vocab_size:
            raise CheckpointError(
                f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model {config.language.vocab_size:,} rows; "
                "use the tokenizer of the model"
            )
        self.rule()  # checks the limits now, not at the first picture
        self._image_start, self._image_end = (
            [tokenizer.id_of(token)] if token else [] for token in (self.template.image_start, self.template.image_end)
        )
        self._slot = tokenizer.id_of(self.template.slot)
        end = tokenizer.id_of(self.template.end)
        others = [tokenizer.id_of(token) for token in self.template.stop if tokenizer.has(token)]
        self._counts: dict[str, int] = {}  # of texts
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([end, *others]))

    @classmethod
    def load(cls, folder: Path, config: ModelConfig, *, max_tiles: int | None = None, system: str | None = None) -> Self:
        """The inputs of the model in a folder, with the tokenizers that lie there. Raises CheckpointError, ConfigError."""
        former, questions = config.connector.qformer, None
        if config.reads_question:
            assert former is not None, "reads_question says so"
            questions = QuestionTokenizer.load(folder, former.vocab_size, former.max_positions)
        return cls(config, Tokenizer.load(folder), max_tiles=max_tiles, system=system, questions=questions)

    def build(
        self, messages: Sequence[Message], pictures: Sequence[Picture] = (), *, open_turn: bool = True, room: int = 0
    ) -> ModelInput:
        """Pictures go to the <image> marks in order, over the whole conversation; room: tokens to leave for the answer.

        Text is tokenised in runs of one learn flag, so an answer gets the same ids in training and in talking.
        Raises PromptError (marks and pictures differ in number, …), ContextError (too long), ImageError.
        """
        pieces = self._pieces(messages, len(pictures), open_turn)
        sizes = [read_size(picture.source, limit_megapixels=self.limit_megapixels) for picture in pictures]
        limits = [picture.max_tiles for picture in pictures]
        ids, learn, queries = self._ids(pieces, self._slots_of_each(sizes, limits))
        if len(ids) + room > self.context_tokens:  # told before a pixel is decoded
            raise ContextError(self._too_long(len(ids), sizes, limits, room))
        cut = [self._cut(picture) for picture in pictures]
        counts = tuple(len(one.digests) for one in cut)
        questions = self._questions(messages, counts)
        assert [(one.width_px, one.height_px) for one in cut] == sizes, "a header's size was not the picture's"
        windows = [self.window(*size, limit) for size, limit in zip(sizes, limits, strict=True)]
        side = self.config.tile_size_px
        row = torch.tensor(ids, dtype=torch.int64)
        return ModelInput(
            ids=row,
            learn=torch.tensor(learn, dtype=torch.bool),
            slots=row == self._slot,  # text never holds this id: the tokenizer keeps it out
            tiles=torch.cat([one.pixels for one in cut]) if cut else torch.empty((0, 3, side, side), dtype=torch.uint8),
            tiles_per_picture=counts,
            digests=with_questions([digest for one in cut for digest in one.digests], questions),
            windows=tuple(window for window in windows if window is not None),
            questions=questions,
            queries=torch.tensor(queries, dtype=torch.int64) if max(queries, default=-1) >= 0 else None,
        )

    def build_text(self, text: str, *, room: int = 0) -> ModelInput:
        """A text as it stands, without a template or pictures, for the model to go on with. Raises PromptError, ContextError."""
        bos = self.tokenizer.bos_id
        ids = ([bos] if self.template.add_bos and bos is not None else []) + self.tokenizer.encode(text)
        if not ids:
            raise PromptError("the text is empty; give at least one character")
        if len(ids) + room > self.context_tokens:
            raise ContextError(self._too_long(len(ids), [], [], room))
        nothing = torch.zeros(len(ids), dtype=torch.bool)
        side = self.config.tile_size_px
        tiles = torch.empty((0, 3, side, side), dtype=torch.uint8)
        return ModelInput(torch.tensor(ids, dtype=torch.int64), nothing, nothing, tiles, (), ())

    def measure(
        self,
        messages: Sequence[Message],
        sizes: Sequence[tuple[int, int]] = (),
        *,
        open_turn: bool = True,
        max_tiles: Sequence[int | None] | None = None,
    ) -> int:
        """Tokens that build would make of pictures of these (width, height), without decoding or even having them."""
        return self.lengths(messages, sizes, open_turn=open_turn, max_tiles=max_tiles).tokens

    def lengths(
        self,
        messages: Sequence[Message],
        sizes: Sequence[tuple[int, int]] = (),
        *,
        open_turn: bool = True,
        max_tiles: Sequence[int | None] | None = None,
    ) -> Lengths:
        """The same, with how many of the tokens are learned, and the tiles; texts that were counted before are remembered."""
        limits = [None] * len(sizes) if max_tiles is None else max_tiles
        counts = self._slots_of_each([Size(*size) for size in sizes], limits)
        slots = iter(counts)
        tokens = 1 if self.template.add_bos and self.tokenizer.bos_id is not None else 0
        learned = 0
        for piece in self._stretches(self._pieces(messages, len(sizes), open_turn)):
            if piece.kind == "text" and piece.learn and self.tokenizer.routes:
                ids, learn, _ = spoken(self.tokenizer, piece.text)
                tokens, learned = tokens + len(ids), learned + sum(learn)
                continue
            if piece.kind == "text":
                count = self._count(piece.text)
            else:
                count = 1 if piece.kind == "control" else len(self._image_start) + next(slots) + len(self._image_end)
            tokens += count
            learned += count if piece.learn else 0
        return Lengths(tokens, learned, sum(self.tiles_of(*size, most) for size, most in zip(sizes, limits, strict=True)))

    def _count(self, text: str) -> int:
        """Tokens of a text. A set's questions are often the same few, and its system text is."""
        if text not in self._counts:
            if len(self._counts) >= REMEMBERED:
                self._counts.clear()
            self._counts[text] = len(self.tokenizer.encode(text))
        return self._counts[text]

    def tiles_of(self, width_px: int, height_px: int, max_tiles: int | None = None) -> int:
        """Tiles of a picture of this size, the whole picture counted where it is one of them."""
        return count_tiles(width_px, height_px, self.rule(max_tiles))

    def slots_of(self, width_px: int, height_px: int, max_tiles: int | None = None) -> int:
        """Visual tokens of a picture of this size."""
        window = self.window(width_px, height_px, max_tiles)
        if window is not None:
            return self.config.slots_per_tile + window.tokens
        return self.config.slots_per_tile * count_tiles(width_px, height_px, self.rule(max_tiles))

    def window(self, width_px: int, height_px: int, max_tiles: int | None = None) -> Window | None:
        """What is shown of the patches of a picture of this size; None where every tile stands for itself."""
        return picture_window(width_px, height_px, self.rule(max_tiles), self.config.patches_per_side)

    def rule(self, max_tiles: int | None = None) -> TileRule:
        """The tile rule of a picture; max_tiles overrides the limit."""
        config = self.config
        most = self.max_tiles if max_tiles is None else max_tiles
        return TileRule(
            config.tile_size_px,
            min(config.min_tiles, max(most, 1)),
            most,
            config.use_thumbnail,
            config.tile_rule,
            tuple(Grid(*grid) for grid in config.grids),
        )

    def _pieces(self, messages: Sequence[Message], n_pictures: int, open_turn: bool) -> tuple[Piece, ...]:
        marks = count_marks(messages)
        if marks != n_pictures:
            raise PromptError(
                f"{n_pictures} picture{'' if n_pictures == 1 else 's'}, but {marks} <image> mark{'' if marks == 1 else 's'} "
                "in the users' turns; each picture needs one mark"
            )
        return render(messages, self.template, system=self.system, open_turn=open_turn)

    def _questions(self, messages: Sequence[Message], tiles_per_picture: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """The ids of the text of the turn that shows it, for each tile. Raises PromptError for a text that is too long."""
        if self.questions is None:
            return ()
        turns = [message.text for message in messages if message.role == "user"]
        ids = [
            self.questions.encode(text.replace(IMAGE_MARK, "").strip()) for text in turns for _ in range(text.count(IMAGE_MARK))
        ]
        return tuple(one for one, count in zip(ids, tiles_per_picture, strict=True) for _ in range(count))

    def _slots_of_each(self, sizes: Sequence[Size], limits: Sequence[int | None], cap: int = MOST_TILES) -> list[int]:
        """Slots of each picture, none cut into more than cap tiles."""
        caps = [min(cap, self.max_tiles if limit is None else limit) for limit in limits]
        return [self.slots_of(*size, most) for size, most in zip(sizes, caps, strict=True)]

    def _stretches(self, pieces: Sequence[Piece]) -> Iterator[Piece]:
        """Pieces as they are tokenised: neighbouring texts joined, without the white space that a token before them drops."""
        stripping = False
        for piece in _joined(pieces):
            if piece.kind == "text":
                text = piece.text.lstrip() if stripping else piece.text
                stripping = stripping and not text
                yield Piece(text, "text", piece.learn)
                continue
            ends = piece.text if piece.kind == "control" else self.template.image_end or self.template.slot
            stripping = self.tokenizer.strips_after(ends)
            yield piece

    def _ids(self, pieces: Sequence[Piece], slot_counts: Sequence[int]) -> tuple[list[int], list[bool], list[int]]:
        """Ids, learn flags and super-link queries (-1: none) of the whole prompt."""
        bos = self.tokenizer.bos_id
        begin = [bos] if self.template.add_bos and bos is not None else []
        late = bool(pieces) and self.template.picture_before_bos and pieces[0].kind == "image"
        ids = [] if late else begin
        learn, queries = [False] * len(ids), [-1] * len(ids)
        counts = iter(slot_counts)
        for piece in self._stretches(pieces):
            if piece.kind == "text":
                if piece.learn and self.tokenizer.routes:  # what the model says itself: only there is [DET] a token
                    new, own_learn, own_queries = spoken(self.tokenizer, piece.text)
                    ids, learn, queries = ids + new, learn + own_learn, queries + own_queries
                    continue
                new = self.tokenizer.encode(piece.text)
            elif piece.kind == "control":
                new = [self.tokenizer.id_of(piece.text)]
            else:
                new = [*self._image_start, *[self._slot] * next(counts), *self._image_end, *(begin if late else [])]
                late = False
            ids += new
            learn += [piece.learn] * len(new)
            queries += [-1] * len(new)
        return ids, learn, queries

    def _cut(self, picture: Picture) -> Tiles:
        image = open_image(picture.source, limit_megapixels=self.limit_megapixels)
        return cut_tiles(image, self.rule(picture.max_tiles))

    def _too_long(self, tokens: int, sizes: Sequence[Size], limits: Sequence[int | None], room: int) -> str:
        """What is too long, by how much, and a --max-tiles that would do, if any does."""
        tiles, slots = self._tiles(sizes, limits), sum(self._slots_of_each(sizes, limits))
        what = f"{tokens:,} tokens" + (f" with {tiles} tile{'' if tiles == 1 else 's'}" if tiles else "")
        if room:
            what += f" and {room:,} more for the answer"
        what += f"; at most {self.context_tokens:,}: "
        fitting = self.context_tokens - room - tokens + slots
        most = max([self.max_tiles if limit is None else limit for limit in limits], default=0)
        counts = {cap: sum(self._slots_of_each(sizes, limits, cap)) for cap in range(1, most)}
        best = max((count for count in counts.values() if count <= fitting), default=0)
        if best:  # the smallest cap of those that cut alike: 6, not 11, where both make 3 x 2
            return f"{what}fewer tiles, or --max-tiles {min(cap for cap, count in counts.items() if count == best)}"
        if room and tokens <= self.context_tokens:
            return f"{what}ask for an answer of at most {self.context_tokens - tokens:,} (--max-tokens)"
        return what + ("fewer pictures or turns, or a shorter text" if tiles else "fewer turns, or a shorter text")

    def _tiles(self, sizes: Sequence[Size], limits: Sequence[int | None]) -> int:
        """Tiles of all pictures."""
        return sum(count_tiles(*size, self.rule(limit)) for size, limit in zip(sizes, limits, strict=True))


def with_questions(digests: Sequence[str], questions: Sequence[tuple[int, ...]]) -> tuple[str, ...]:
    """Digests of tiles, or of tiles and the questions that were read beside them: equal ones give equal visual tokens."""
    if not questions:
        return tuple(digests)
    pairs = zip(digests, questions, strict=True)
    return tuple(hashlib.sha256(f"{digest} {question}".encode()).hexdigest() for digest, question in pairs)


def spoken(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[bool], list[int]]:
    """Ids, learn flags and queries of the model's own words: behind a routing token stand its queries, which are not learned.

    A query's place bears the id of its token; what is read there is the query.
    """
    ids: list[int] = []
    learn: list[bool] = []
    queries: list[int] = []
    for index, part in enumerate(tokenizer.routes.split(text)):
        if index % 2 == 0:
            new = tokenizer.encode(part)
            ids, learn, queries = ids + new, learn + [True] * len(new), queries + [-1] * len(new)
            continue
        route = tokenizer.routes.named(part)
        ids += [route.token_id] * (1 + route.queries)
        learn += [True] + [False] * route.queries
        queries += [-1, *range(route.first, route.first + route.queries)]
    return ids, learn, queries


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbouring texts of one learn flag become one, so that a tokenizer may merge across their seam."""
    runs: list[Piece] = []
    for piece in pieces:
        last = runs[-1] if runs else None
        if last is not None and last.kind == piece.kind == "text" and last.learn == piece.learn:
            runs[-1] = Piece(last.text + piece.text, "text", piece.learn)
        else:
            runs.append(piece)
    return runs
