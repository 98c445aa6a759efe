"""From a request to requests of the engine: names, pictures, prompt, schema.

In: ChatRequest or CompletionRequest.  Out: engine Requests, one for each answer, in the order of their numbers.
The event loop only waits here: pictures are opened, cut and tokenised, and schemas compiled, in a bounded pool of threads.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tessella.engine.request import EngineState, Mask, OnPiece, Request, Ticket
from tessella.errors import ConfigError, ContextError, ImageError, PromptError, QueueFull, TessellaError
from tessella.inputs import Inputs, ModelInput, Picture
from tessella.sampling import SamplingParams
from tessella.server.fetch import Fetcher
from tessella.server.grammar import ANY_OBJECT, Grammars
from tessella.server.limits import Budget, Lease
from tessella.server.metrics import Metrics
from tessella.server.pictures import bytes_of_data_url, check_pictures, is_data_url, unreadable
from tessella.server.prompts import Shown, conversation
from tessella.server.refusal import Refusal
from tessella.server.settings import Settings
from tessella.server.stream import Mailbox
from tessella.server.wire import ChatRequest, CompletionRequest, Drawing, JsonFormat, SchemaFormat

Result = TypeVar("Result")
LETTERS_A_TOKEN = 128  # of the longest tokens, which are runs of spaces


class Engine(Protocol):
    """What the server asks of the engine; see engine/request.py and engine/engine.py."""

    @property
    def longest_row(self) -> int: ...

    def submit(self, request: Request, on_piece: OnPiece) -> Ticket: ...

    def state(self) -> EngineState: ...

    def unload_adapter(self, name: str) -> None: ...


class Service:
    """One model behind the wire; made in the event loop that it serves.

    load_adapter: reads a folder and hands what is in it to the engine under a name, blocking; the command line joins the two.
    """

    def __init__(self, engine: Engine, inputs: Inputs, settings: Settings, load_adapter: Callable[[str, Path], None]):
        self.engine = engine
        self.inputs = inputs
        self.settings = settings
        self.load_adapter = load_adapter
        self.draining = False
        self.started = int(time.time())
        self.pool = ThreadPoolExecutor(settings.workers, thread_name_prefix="tessella-prepare")
        self.memory = Budget(settings.memory_bytes)
        self.metrics = Metrics(engine.state)
        self.fetcher = Fetcher(settings)
        rows = inputs.config.language.vocab_size
        self.grammars = Grammars(inputs.tokenizer, rows, inputs.stop_ids[0], settings.schema_bytes)
        self.mailbox = Mailbox(asyncio.get_running_loop())

    async def close(self) -> None:
        await self.fetcher.close()
        self.pool.shutdown(wait=False, cancel_futures=True)

    async def in_pool(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self.pool, work)

    def ready(self) -> bool:
        return self.engine.state().alive and not self.draining

    # ---- requests

    async def prepare_chat(self, wish: ChatRequest, lease: Lease) -> list[Request]:
        """Raises Refusal. lease: what the tiles are counted on."""
        adapter = self._adapter(wish.model)
        answers = self._answers(wish, 1)
        turns, shown = conversation(wish.messages, wish.max_tiles)
        if len(shown) > self.settings.pictures:
            raise Refusal(400, f"{len(shown)} pictures; at most {self.settings.pictures}: send fewer", code="too_many_images")
        self._check_length(turn.text for turn in turns)
        fetched = await self._fetch(shown)

        def build() -> list[Request]:
            pictures = self._open(shown, fetched)
            wanted = wish.max_tokens or wish.max_completion_tokens
            prompt = self.inputs.build(turns, pictures, room=wanted or 1)
            lease.take(prompt.tiles.nbytes)
            logprobs = (wish.top_logprobs or 0) if wish.logprobs else None
            masks = [self._mask(wish) for _ in range(answers)]
            return self._requests(wish, prompt, wanted, adapter, logprobs, masks)

        return await self._told(build)

    async def prepare_completion(self, wish: CompletionRequest, lease: Lease) -> list[Request]:
        """Raises Refusal."""
        adapter = self._adapter(wish.model)
        texts = [wish.prompt] if isinstance(wish.prompt, str) else wish.prompt
        answers = self._answers(wish, len(texts))
        self._check_length(texts)

        def build() -> list[Request]:
            prompts = [self.inputs.build_text(text, room=wish.max_tokens or 1) for text in texts]
            masks = [None] * (answers // len(texts))
            rows = [self._requests(wish, prompt, wish.max_tokens, adapter, wish.logprobs, masks) for prompt in prompts]
            return [request for row in rows for request in row]

        return await self._told(build)

    def _adapter(self, name: str) -> str | None:
        """None for the base model. Raises Refusal 404."""
        if name == self.settings.name:
            return None
        adapters = self.engine.state().adapters
        if name not in adapters:
            served = ", ".join((self.settings.name, *adapters))
            raise Refusal(404, f"that model is not served; there are {served}", param="model", code="model_not_found")
        return name

    def _answers(self, wish: Drawing, prompts: int) -> int:
        """How many answers are asked for. Raises Refusal 400 for too many, 429 when the queue could not take them."""
        answers = (wish.n or 1) * prompts
        most = min(self.settings.answers, self.settings.queue)  # more than may wait could never be taken
        if answers > most:
            raise Refusal(400, f"{answers} answers; at most {most} a request", param="n", code="too_many_answers")
        if self.engine.state().waiting >= self.settings.queue:  # told before any picture is opened
            raise queue_full()
        return answers

    def _check_length(self, texts: Iterable[str]) -> None:
        """What cannot fit in any tokenizer's hands is not handed to it: it takes a second for each megabyte."""
        letters, most = sum(map(len, texts)), self.inputs.context_tokens * LETTERS_A_TOKEN
        if letters > most:
            message = f"{letters:,} letters; at most {most:,}, and fewer if they are words: send a shorter text"
            raise Refusal(400, message, code="context_length_exceeded")

    async def _fetch(self, shown: Sequence[Shown]) -> dict[str, bytes]:
        """The pictures from the web, by URL, one after the other: a request is no reason to knock at many doors at once."""
        fetched: dict[str, bytes] = {}
        for picture in shown:
            if not is_data_url(picture.url) and picture.url not in fetched:
                fetched[picture.url] = await self.fetcher.fetch(picture.url, picture.where)
        return fetched

    def _open(self, shown: Sequence[Shown], fetched: dict[str, bytes]) -> list[Picture]:
        data = [fetched.get(one.url) or bytes_of_data_url(one.url, one.where) for one in shown]
        check_pictures(data, [one.where for one in shown], self.settings)
        return [Picture(encoded, one.max_tiles) for encoded, one in zip(data, shown, strict=True)]

    def _mask(self, wish: ChatRequest) -> Mask | None:
        match wish.response_format:
            case SchemaFormat(json_schema=named):
                return self.grammars.mask(named.schema_)
            case JsonFormat():
                return self.grammars.mask(ANY_OBJECT)
        return None

    def _requests(
        self,
        wish: Drawing,
        prompt: ModelInput,
        wanted: int | None,
        adapter: str | None,
        logprobs: int | None,
        masks: Sequence[Mask | None],
    ) -> list[Request]:
        """One for each mask. Without a wish, an answer may be as long as there is room for, up to the server's default."""
        room = min(self.inputs.context_tokens, self.engine.longest_row) - len(prompt)
        params = params_of(wish, wanted or max(1, min(self.settings.default_max_tokens, room)))
        stop_ids = (*self.inputs.stop_ids, *(wish.stop_token_ids or ()))
        return [
            Request(
                prompt,
                params if wish.seed is None else replace(params, seed=wish.seed + number),
                stop_ids,
                adapter,
                logprobs,
                mask,
            )
            for number, mask in enumerate(masks)
        ]

    async def _told(self, build: Callable[[], list[Request]]) -> list[Request]:
        started = time.perf_counter()
        try:
            return await self.in_pool(build)
        except TessellaError as error:
            raise refusal_of(error) from error
        finally:
            self.metrics.prepare.observe(time.perf_counter() - started)


def params_of(wish: Drawing, max_tokens: int) -> SamplingParams:
    """What the wish says, and for the rest SamplingParams' own defaults. Raises ConfigError."""
    said: dict[str, Any] = {
        "temperature": wish.temperature,
        "top_p": wish.top_p,
        "top_k": wish.top_k,
        "min_p": wish.min_p,
        "repetition_penalty": wish.repetition_penalty,
        "presence_penalty": wish.presence_penalty,
        "frequency_penalty": wish.frequency_penalty,
        "seed": wish.seed,
    }
    return replace(
        SamplingParams(max_tokens=max_tokens, stop=wish.stops()),
        **{name: value for name, value in said.items() if value is not None},
    )


def refusal_of(error: TessellaError) -> Refusal:
    """The same in the words of the wire."""
    match error:
        case QueueFull():
            return queue_full()
        case ImageError():  # its text may hold a decoder's own words
            return unreadable(None, "is damaged or cut off")
        case ContextError():
            return Refusal(400, _in_fields(str(error)), code="context_length_exceeded", param="messages")
        case PromptError() | ConfigError():
            return Refusal(400, _in_fields(str(error)), code="invalid_value")
    return Refusal(503, f"the engine does not take it: {error}", code="engine_unavailable", retry_s=5)


def queue_full() -> Refusal:
    return Refusal(429, "as many requests wait as may wait; send it again later", code="queue_full", retry_s=2)


def _in_fields(message: str) -> str:
    """Flags of the command line are fields here."""
    return message.replace("--max-tiles", "max_tiles").replace("--max-tokens", "max_tokens")
