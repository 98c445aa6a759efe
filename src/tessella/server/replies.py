"""What goes back to a client: OpenAI's objects, whole or in chunks.

In: an answer's text, ids, log probabilities and usage.  Out: pydantic models; lines of server-sent events.
"""

import secrets
import time
from typing import Any, Literal

from pydantic import BaseModel, Field, model_serializer

Finish = Literal["stop", "length"]


class TokenDetails(BaseModel):
    cached_tokens: int


class UsageBody(BaseModel):
    """tiles and seconds_to_first_token are ours."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: TokenDetails
    tiles: int
    seconds_to_first_token: float | None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    content: list[TokenLogprob]


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    routed: list[dict[str, Any]] | None = None  # of a model with routing tokens alone: boxes, masks and pictures

    @model_serializer
    def what_is_there(self) -> dict[str, Any]:
        said: dict[str, Any] = {"role": self.role, "content": self.content}
        return said if self.routed is None else {**said, "routed": self.routed}


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: Finish


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    routed: list[dict[str, Any]] | None = None  # with the last piece of a model with routing tokens

    @model_serializer
    def what_is_new(self) -> dict[str, Any]:
        said = {"role": self.role, "content": self.content, "routed": self.routed}
        return {key: value for key, value in said.items() if value is not None}


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: Finish | None = None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: UsageBody | None = None


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: Finish | None = None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: UsageBody | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["tessella"] = "tessella"
    parent: str | None = Field(None, description="Of an adapter: the model that it was taught on.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Status(BaseModel):
    status: str


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


def now() -> int:
    return int(time.time())


def event(chunk: BaseModel) -> bytes:
    """One server-sent event."""
    return b"data: %b\n\n" % chunk.model_dump_json().encode()


END = b"data: [DONE]\n\n"
QUIET = b": still at work\n\n"  # a comment, so that no proxy takes the silence for death
