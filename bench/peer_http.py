"""Another engine's OpenAI server asked the same work as ours: vLLM, LMDeploy, or any that takes `ignore_eos`.

In: its address and work (texts, or sizes of pictures).  Out: rows of numbers. The server is started beforehand, with weights of
the same shapes (random ones will do: `--load-format dummy` in vLLM). Pictures travel as PNG, so its own cutting is on the clock;
ours is measured so, too, in the row "from the pixels".
"""

import asyncio
import base64
import io
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
import torch
from PIL import Image

from tessella.image import Size


@dataclass(frozen=True)
class Timed:
    """One answer."""

    first_s: float  # from the request to the first piece of text
    last_s: float
    tokens: int


def noise(size: Size, seed: int) -> str:
    """A picture of noise as a data address."""
    chance = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size.height_px, size.width_px, 3), dtype=torch.uint8, generator=chance)
    held = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(held, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()


def asking(model: str, question: str, picture: str | None, max_tokens: int) -> dict[str, Any]:
    """The body of one request: greedy, streamed, and as long as it may be."""
    content: Any = question
    if picture is not None:
        content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": question}]
    told = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": max_tokens, "temperature": 0}
    return told | {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}


async def one(client: httpx2.AsyncClient, url: str, body: dict[str, Any]) -> Timed:
    begun, first, tokens = time.perf_counter(), None, 0
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            raise SystemExit(f"{url} said {answer.status_code}: {(await answer.aread())[:300]!r}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            told = json.loads(line.removeprefix("data: "))
            if first is None and told.get("choices"):
                first = time.perf_counter() - begun
            if told.get("usage"):
                tokens = told["usage"]["completion_tokens"]
    if first is None:
        raise SystemExit(f"{url} ended a stream without an answer")
    return Timed(first, time.perf_counter() - begun, tokens)


async def together(url: str, bodies: Sequence[dict[str, Any]]) -> tuple[list[Timed], float]:
    """All at once -> each, and the seconds of all."""
    limits = httpx2.Limits(max_connections=len(bodies))
    async with httpx2.AsyncClient(timeout=600, limits=limits) as client:
        begun = time.perf_counter()
        answers = await asyncio.gather(*(one(client, url, body) for body in bodies))
        return list(answers), time.perf_counter() - begun


@dataclass(frozen=True)
class Speeds:
    """Of requests that ran side by side."""

    requests_per_second: float
    tokens_per_second: float
    first_ms: float  # median
    stream_tokens_per_second: float  # of one of them, after its first token


def measured(url: str, questions: Sequence[str], size: Size | None, max_tokens: int) -> Speeds:
    """One request for each question, each with a picture of its own unless size is None."""
    models = httpx2.get(f"{url}/v1/models", timeout=30).json()["data"]
    pictures = [None if size is None else noise(size, seed) for seed in range(len(questions))]
    bodies = [
        asking(models[0]["id"], question, picture, max_tokens) for question, picture in zip(questions, pictures, strict=True)
    ]
    answers, seconds = asyncio.run(together(url, bodies))
    after_first = [(answer.tokens - 1) / (answer.last_s - answer.first_s) for answer in answers if answer.tokens > 1]
    return Speeds(
        len(answers) / seconds,
        sum(answer.tokens for answer in answers) / seconds,
        1000 * statistics.median(answer.first_s for answer in answers),
        statistics.median(after_first) if after_first else 0.0,
    )
