"""What the engine is asked when its speed is measured, and how it is asked.

In: a model's Inputs, counts and lengths.  Out: ModelInputs; Run, what the answers took.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from tessella.chat import Message, place_marks
from tessella.engine.engine import Engine
from tessella.engine.request import Piece, Request
from tessella.image import Size
from tessella.inputs import Inputs, ModelInput, Picture
from tessella.sampling import SamplingParams

QUESTIONS = (
    "What is a good dinner for a cold evening?",
    "Name three fruits and say what colour each of them has.",
    "How do I cook rice so that it does not stick to the pot?",
    "Tell me a short story about a cat that lives in a kitchen.",
    "What should I look at when I buy tomatoes at a market?",
    "Write two sentences about the sea.",
    "Why does bread become hard after a day?",
    "What can I make from eggs, flour and milk?",
)
ABOUT_A_PICTURE = "What food is in this picture?"


def questions(inputs: Inputs, count: int) -> list[ModelInput]:
    """count prompts of text, no two alike."""
    texts = [QUESTIONS[i % len(QUESTIONS)] + (f" ({i})" if i >= len(QUESTIONS) else "") for i in range(count)]
    return [inputs.build([Message("user", text)]) for text in texts]


def picture_questions(
    inputs: Inputs,
    count: int,
    size: Size,
    max_tiles: int | None = None,
    *,
    first_seed: int = 0,
    question: str = ABOUT_A_PICTURE,
) -> list[ModelInput]:
    """count prompts with a picture of noise each, no two alike."""
    return [about(inputs, noise(size, seed), max_tiles, question) for seed in range(first_seed, first_seed + count)]


def noise(size: Size, seed: int) -> Image.Image:
    chance = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (size.height_px, size.width_px, 3), dtype=torch.uint8, generator=chance).numpy())


def about(inputs: Inputs, picture: Image.Image, max_tiles: int | None = None, question: str = ABOUT_A_PICTURE) -> ModelInput:
    """A question about one picture, cut."""
    return inputs.build([Message("user", place_marks(question, 1))], [Picture(picture, max_tiles)])


@dataclass
class Timed:
    """One answer: when it was asked for, when each of its ids came."""

    asked: float = 0.0
    came: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    cached_tokens: int = 0


@dataclass(frozen=True)
class Run:
    """Answers that ran side by side."""

    answers: list[Timed]
    seconds: float  # from the first submit to the last id
    cpu_seconds: float  # of this process meanwhile

    @property
    def tokens_per_second(self) -> float:
        return sum(len(one.ids) for one in self.answers) / self.seconds

    @property
    def requests_per_second(self) -> float:
        return len(self.answers) / self.seconds

    @property
    def seconds_to_first(self) -> list[float]:
        return [one.came[0] - one.asked for one in self.answers]

    @property
    def tokens_per_second_after_the_first(self) -> float:
        """Of one stream alone."""
        (one,) = self.answers
        return (len(one.came) - 1) / (one.came[-1] - one.came[0])


def ask(engine: Engine, prompts: Sequence[ModelInput], params: SamplingParams) -> Run:
    """All at once; no stop id, so that every answer is params.max_tokens long."""
    answers = [Timed() for _ in prompts]
    left, over = [len(prompts)], threading.Event()

    def hear(one: Timed, piece: Piece) -> None:
        one.came += [time.perf_counter()] * len(piece.ids)
        one.ids += piece.ids
        if piece.finish is None:
            return
        assert piece.finish == "length", f"an answer ended with {piece.finish}: {piece.error}"
        assert piece.usage is not None
        one.cached_tokens = piece.usage.cached_tokens
        left[0] -= 1
        if not left[0]:
            over.set()

    start, cpu = time.perf_counter(), time.process_time()
    for one, prompt in zip(answers, prompts, strict=True):
        one.asked = time.perf_counter()
        engine.submit(Request(prompt, params, ()), lambda piece, one=one: hear(one, piece))
    while not over.wait(1.0):
        assert engine.state().alive, engine.state().failure
    return Run(answers, time.perf_counter() - start, time.process_time() - cpu)
