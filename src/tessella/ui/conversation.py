"""A conversation: what was asked and shown, and what one model or two answered.

In: questions with pictures, answers as they grow.  Out: the messages of a request, a record in JSON, a row to teach from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from tessella.ui.pictures import Picture
from tessella.ui.trouble import Trouble

Ended = Literal["", "stop", "length", "stopped", "trouble"]  # "": still growing


@dataclass(frozen=True)
class Settings:
    """How answers are asked for; None leaves it to the server."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 512
    max_tiles: int | None = None
    seed: int | None = None
    system: str = ""

    def as_fields(self) -> dict[str, Any]:
        """Fields of a chat completion."""
        fields: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens}
        if self.max_tiles is not None:
            fields["max_tiles"] = self.max_tiles
        if self.seed is not None:
            fields["seed"] = self.seed
        return fields


@dataclass
class Answer:
    """One model's answer, as far as it has come. Times are the page's own, so they count the way to the server too."""

    model: str
    settings: Settings
    text: str = ""
    ended: Ended = ""
    trouble: Trouble | None = None
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    tiles: int | None = None
    first_token_s: float | None = None
    seconds: float = 0.0
    corrected: bool = False
    routed: list[dict[str, Any]] = field(default_factory=list)  # boxes, masks and pictures of a model with routing tokens

    @property
    def tokens_a_second(self) -> float | None:
        """From the first token on, which costs the whole prompt; None for fewer than two tokens."""
        if self.first_token_s is None or self.answer_tokens is None or self.answer_tokens < 2:
            return None
        return (self.answer_tokens - 1) / max(self.seconds - self.first_token_s, 1e-3)

    def as_json(self) -> dict[str, Any]:
        names = ("text", "routed", "ended", "corrected", "prompt_tokens", "answer_tokens", "tiles", "first_token_s", "seconds")
        record = {"model": self.model, **{name: self.__dict__[name] for name in names}}
        settings = {**self.settings.as_fields(), "system": self.settings.system}
        return {**record, "settings": settings, "trouble": str(self.trouble) if self.trouble else None}


@dataclass
class Turn:
    """A question with its pictures, and an answer a column: one, or two where models are compared."""

    question: str
    pictures: tuple[Picture, ...] = ()
    answers: list[Answer] = field(default_factory=list)

    def answer(self, column: int) -> Answer:
        """A turn from before the comparison has one answer, which both columns remember."""
        return self.answers[min(column, len(self.answers) - 1)]

    def content(self) -> str | list[dict[str, Any]]:
        """Of the user's message: text alone, or pictures and then the text, the order in which the models were taught."""
        if not self.pictures:
            return self.question
        shown = [{"type": "image_url", "image_url": {"url": picture.data_url()}} for picture in self.pictures]
        return [*shown, {"type": "text", "text": self.question}]


def messages_of(turns: Sequence[Turn], column: int, system: str) -> list[dict[str, Any]]:
    """What a model has heard and said in a column. A question that got no answer at all is left out: it is asked anew or not."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        answer = turn.answer(column)
        if answer.text.strip():
            messages.append({"role": "user", "content": turn.content()})
            messages.append({"role": "assistant", "content": answer.text})
    return messages


def request_of(turns: Sequence[Turn], turn: Turn, column: int, model: str, settings: Settings) -> dict[str, Any]:
    """The body of a chat completion that answers turn after turns."""
    messages = [*messages_of(turns, column, settings.system), {"role": "user", "content": turn.content()}]
    wish = {"stream": True, "stream_options": {"include_usage": True}}
    return {"model": model, "messages": messages, **settings.as_fields(), **wish}


def record_of(turns: Sequence[Turn]) -> dict[str, Any]:
    """The whole conversation with its pictures, settings and numbers. Raises Trouble when nothing was said."""
    if not turns:
        raise Trouble("nothing_to_save")
    said = [
        {
            "question": turn.question,
            "pictures": [{"name": picture.name, "url": picture.data_url()} for picture in turn.pictures],
            "answers": [answer.as_json() for answer in turn.answers],
        }
        for turn in turns
    ]
    return {"version": 1, "saved": datetime.now(UTC).isoformat(timespec="seconds"), "turns": said}


def row_of(turns: Sequence[Turn], column: int) -> dict[str, Any]:
    """One row that `tessella finetune --data` reads: messages with their pictures in them. Raises Trouble without an answer.

    The system message is the one of the last answer; without one the template's own is learned, as it is asked.
    """
    system = turns[-1].answer(column).settings.system if turns else ""
    messages = messages_of(turns, column, system)
    if not any(message["role"] == "assistant" for message in messages):
        raise Trouble("nothing_to_learn")
    return {"messages": messages}
