"""Answers under way, told in OpenAI's forms: whole, or as events.

In: the engine's requests for one wish.  Out: ChatCompletion or Completion; or chunks of them as server-sent events.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import BaseModel

from tessella.engine.request import Logprob, Piece, Request, Usage
from tessella.errors import TessellaError
from tessella.server.grammar import JsonMask
from tessella.server.limits import Lease
from tessella.server.refusal import Refusal
from tessella.server.replies import (
    QUIET,
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChunkChoice,
    Completion,
    Delta,
    Finish,
    Logprobs,
    TextChoice,
    TextLogprobs,
    TokenDetails,
    TokenLogprob,
    TopLogprob,
    UsageBody,
    event,
    new_id,
    now,
)
from tessella.server.service import Service, refusal_of
from tessella.server.stream import Running, join
from tessella.server.wire import Drawing
from tessella.tokenizer import Tokenizer


class Answers:
    """The answers to one wish. They hold memory and places in the engine until end is called, which may be done twice."""

    def __init__(self, service: Service, requests: Sequence[Request], wish: Drawing, lease: Lease):
        """Raises Refusal when the engine does not take them."""
        self.wish = wish
        self.tokenizer = service.inputs.tokenizer
        self.usages: dict[int, Usage] = {}
        self.count = len(requests)
        self._masks = [request.mask for request in requests]
        self._lease = lease
        self._watch = service.metrics.watch()
        self._running = Running(service.mailbox, len(requests))
        try:
            self._running.start(lambda index, on_piece: service.engine.submit(requests[index], on_piece))
        except TessellaError as error:
            raise refusal_of(error) from error

    async def parts(self) -> AsyncIterator[tuple[int, Piece] | None]:
        """As Running.parts; raises Refusal 400 where a schema was at fault."""
        try:
            async for part in self._running.parts():
                if part is not None:
                    self._saw(*part)
                yield part
        except Refusal as refusal:
            if any(isinstance(mask, JsonMask) and mask.failed for mask in self._masks):
                message = refusal.body.error.message
                raise Refusal(400, message, param="response_format", code="invalid_schema") from refusal
            raise

    def _saw(self, index: int, piece: Piece) -> None:
        self._watch.saw(index, piece)
        if piece.usage is not None:
            self.usages[index] = piece.usage

    def end(self) -> None:
        self._running.cancel()
        self._lease.end()

    def usage(self) -> UsageBody:
        """Of all answers; a prompt that n answers share counts once."""
        first = [self.usages[index] for index in range(0, self.count, self.wish.n or 1)]
        prompt_tokens = sum(one.prompt_tokens for one in first)
        answer_tokens = sum(one.answer_tokens for one in self.usages.values())
        waits = [one.seconds_to_first_token for one in self.usages.values() if one.seconds_to_first_token is not None]
        return UsageBody(
            prompt_tokens=prompt_tokens,
            completion_tokens=answer_tokens,
            total_tokens=prompt_tokens + answer_tokens,
            prompt_tokens_details=TokenDetails(cached_tokens=sum(one.cached_tokens for one in first)),
            tiles=sum(one.tiles for one in first),
            seconds_to_first_token=min(waits, default=None),
        )


class Form(Protocol):
    """One of OpenAI's two ways to tell answers."""

    def opening(self, answers: Answers) -> list[BaseModel]:
        """Chunks that come before the first piece."""
        ...

    def chunk(self, answers: Answers, index: int, piece: Piece) -> BaseModel: ...

    def usage_chunk(self, answers: Answers) -> BaseModel: ...

    def whole(self, answers: Answers, pieces: Sequence[Piece]) -> BaseModel:
        """pieces: of each answer all its pieces, joined."""
        ...


async def events(form: Form, answers: Answers) -> AsyncIterator[bytes]:
    for chunk in form.opening(answers):
        yield event(chunk)
    async for part in answers.parts():
        yield QUIET if part is None else event(form.chunk(answers, *part))
    options = answers.wish.stream_options
    if options is not None and options.include_usage:
        yield event(form.usage_chunk(answers))


async def collected(form: Form, answers: Answers) -> BaseModel:
    kept: list[list[Piece]] = [[] for _ in range(answers.count)]
    async for part in answers.parts():
        if part is not None:
            kept[part[0]].append(part[1])
    return form.whole(answers, [join(pieces) for pieces in kept])


@dataclass
class ChatForm:
    model: str
    id: str = field(default_factory=lambda: new_id("chatcmpl"))
    created: int = field(default_factory=now)

    def opening(self, answers: Answers) -> list[BaseModel]:
        first = Delta(role="assistant", content="")
        return [self._chunk([ChunkChoice(index=index, delta=first)]) for index in range(answers.count)]

    def chunk(self, answers: Answers, index: int, piece: Piece) -> BaseModel:
        choice = ChunkChoice(
            index=index,
            delta=Delta(content=piece.text or None, routed=routed_of(piece)),
            logprobs=chat_logprobs(answers.tokenizer, piece.logprobs),
            finish_reason=finish_of(piece),
        )
        return self._chunk([choice])

    def usage_chunk(self, answers: Answers) -> BaseModel:
        return self._chunk([], answers.usage())

    def _chunk(self, choices: list[ChunkChoice], usage: UsageBody | None = None) -> BaseModel:
        return ChatChunk(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    def whole(self, answers: Answers, pieces: Sequence[Piece]) -> BaseModel:
        choices = [
            ChatChoice(
                index=index,
                message=AnswerMessage(content=piece.text, routed=routed_of(piece)),
                logprobs=chat_logprobs(answers.tokenizer, piece.logprobs),
                finish_reason=finish_of(piece) or "stop",
            )
            for index, piece in enumerate(pieces)
        ]
        return ChatCompletion(id=self.id, created=self.created, model=self.model, choices=choices, usage=answers.usage())


@dataclass
class TextForm:
    model: str
    id: str = field(default_factory=lambda: new_id("cmpl"))
    created: int = field(default_factory=now)
    offsets: dict[int, int] = field(default_factory=dict)  # characters that each answer has, for its logprobs

    def opening(self, answers: Answers) -> list[BaseModel]:
        return []

    def chunk(self, answers: Answers, index: int, piece: Piece) -> BaseModel:
        return self._completion([self._choice(answers, index, piece)], None)

    def usage_chunk(self, answers: Answers) -> BaseModel:
        return self._completion([], answers.usage())

    def whole(self, answers: Answers, pieces: Sequence[Piece]) -> BaseModel:
        return self._completion([self._choice(answers, index, piece) for index, piece in enumerate(pieces)], answers.usage())

    def _completion(self, choices: list[TextChoice], usage: UsageBody | None) -> BaseModel:
        return Completion(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    def _choice(self, answers: Answers, index: int, piece: Piece) -> TextChoice:
        logprobs = None
        if piece.logprobs:
            logprobs = text_logprobs(answers.tokenizer, piece.logprobs, self.offsets.get(index, 0))
            self.offsets[index] = logprobs.text_offset[-1] + len(logprobs.tokens[-1])
        return TextChoice(index=index, text=piece.text, logprobs=logprobs, finish_reason=finish_of(piece))


def routed_of(piece: Piece) -> list[dict[str, Any]] | None:
    """What routing tokens gave; None where the answer has none."""
    return [dict(one) for one in piece.shown] or None


def finish_of(piece: Piece) -> Finish | None:
    """The others never come here: parts raises them."""
    assert piece.finish in (None, "stop", "length"), piece.finish
    return piece.finish


def chat_logprobs(tokenizer: Tokenizer, logprobs: Sequence[Logprob]) -> Logprobs | None:
    if not logprobs:
        return None

    def told(token_id: int, logprob: float) -> TopLogprob:
        data = tokenizer.bytes_of(token_id, False, True)
        return TopLogprob(token=data.decode("utf-8", "replace"), logprob=finite(logprob), bytes=list(data))

    content = []
    for one in logprobs:
        drawn = told(one.id, one.logprob)
        top = [told(token_id, logprob) for token_id, logprob in one.top]
        content.append(TokenLogprob(token=drawn.token, logprob=drawn.logprob, bytes=drawn.bytes, top_logprobs=top))
    return Logprobs(content=content)


def text_logprobs(tokenizer: Tokenizer, logprobs: Sequence[Logprob], offset: int) -> TextLogprobs:
    told = TextLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for one in logprobs:
        word = tokenizer.bytes_of(one.id, False, True).decode("utf-8", "replace")
        told.tokens.append(word)
        told.token_logprobs.append(finite(one.logprob))
        top = {
            tokenizer.bytes_of(token_id, False, True).decode("utf-8", "replace"): finite(logprob) for token_id, logprob in one.top
        }
        told.top_logprobs.append(top)
        told.text_offset.append(offset)
        offset += len(word)
    return told


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what can hardly be drawn."""
    return max(logprob, -9999.0)
