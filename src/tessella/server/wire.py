"""What a client may send, field by field. Fields that we do not serve are refused by name, never passed over.

In: the bytes of a JSON body.  Out: ChatRequest, CompletionRequest or AdapterRequest, or a Refusal that names the field.
Fields of OpenAI's that are known and not served stand here as None: null asks for nothing and is accepted.
Source: OpenAI's API reference for chat completions; top_k, min_p, repetition_penalty and stop_token_ids as vLLM names them.
"""

import re
from typing import Annotated, Any, Literal, TypeVar

import pydantic_core
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from tessella.server.refusal import Refusal

Unserved = Annotated[None, Field(default=None, description="Not served; only null is accepted.")]
ShortText = Annotated[str, Field(min_length=1, max_length=200)]


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]  # 5.0 is an integer to JSON schema, and so to our page


class Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=False)


class TextPart(Wire):
    type: Literal["text"]
    text: str


class ImageUrl(Wire):
    url: str = Field(description="data:image/png;base64,… ; https addresses only if the server allows their host.")
    detail: Literal["auto", "low", "high"] = Field("auto", description="low: one tile; auto and high: as max_tiles says.")


class ImagePart(Wire):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _one_or_several(value: Any) -> str:
    return "parts" if isinstance(value, list) else "text"


Texts = Annotated[
    Annotated[ShortText, Tag("text")] | Annotated[list[ShortText], Tag("parts"), Field(max_length=16)],
    Discriminator(_one_or_several),
]
Prompts = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[str], Tag("parts"), Field(min_length=1, max_length=128)],
    Discriminator(_one_or_several),
]
Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[Part], Tag("parts"), Field(min_length=1, max_length=256)],
    Discriminator(_one_or_several),
]


class ChatMessage(Wire):
    role: Literal["system", "developer", "user", "assistant"] = Field(description="developer means system.")
    content: Content
    name: Unserved
    refusal: Unserved
    tool_calls: Unserved
    tool_call_id: Unserved
    function_call: Unserved
    audio: Unserved
    annotations: Unserved


class TextFormat(Wire):
    type: Literal["text"]


class JsonFormat(Wire):
    type: Literal["json_object"]


class NamedSchema(Wire):
    name: str = Field(min_length=1, max_length=64)
    schema_: dict[str, Any] = Field(alias="schema", description="JSON schema that the answer obeys.")
    description: str | None = None
    strict: bool | None = Field(None, description="The answer obeys the schema either way.")


class SchemaFormat(Wire):
    type: Literal["json_schema"]
    json_schema: NamedSchema


Format = Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")]


class StreamOptions(Wire):
    include_usage: bool = Field(False, description="The last chunk carries the usage.")


def combination(field: str, what: str) -> pydantic_core.PydanticCustomError:
    """A field that does not go with another; _refusal puts its name before what."""
    return pydantic_core.PydanticCustomError("combination", "{what}", {"field": field, "what": what})


class Drawing(Wire):
    """How an answer is drawn; what both kinds of completions share."""

    model: str = Field(min_length=1, max_length=200, description="A name that /v1/models lists.")
    temperature: float | None = Field(None, ge=0, le=2, description="0, the default, takes the likeliest token.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Whole | None = Field(None, ge=0, le=1_000_000, description="0: all.")
    min_p: float | None = Field(None, ge=0, lt=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    max_tokens: Whole | None = Field(None, ge=1, le=10_000_000, description="Of each answer; default: what the server says.")
    seed: Whole | None = Field(
        None, ge=0, lt=2**62, description="The same seed gives the same answer; answer i draws with seed + i."
    )
    n: Whole | None = Field(None, ge=1, le=128, description="Answers to one prompt.")
    stop: Texts | None = Field(None, description="At most 16.")
    stop_token_ids: list[Whole] | None = Field(None, max_length=64)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: Unserved
    metadata: Unserved
    prompt_cache_key: Unserved
    safety_identifier: Unserved
    service_tier: Unserved
    store: Literal[False] | None = None
    user: Unserved

    @model_validator(mode="after")
    def options_need_a_stream(self) -> "Drawing":
        if self.stream_options is not None and not self.stream:
            raise combination("stream_options", "go with stream: true")
        return self

    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class ChatRequest(Drawing):
    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    max_completion_tokens: Whole | None = Field(None, ge=1, le=10_000_000, description="Another name of max_tokens.")
    max_tiles: Whole | None = Field(None, ge=1, le=40, description="Most tiles a picture is cut into, without the thumbnail.")
    logprobs: bool | None = None
    top_logprobs: Whole | None = Field(None, ge=0, le=20)
    response_format: Format | None = None
    modalities: list[Literal["text"]] | None = None
    audio: Unserved
    function_call: Unserved
    functions: Unserved
    parallel_tool_calls: Unserved
    prediction: Unserved
    reasoning_effort: Unserved
    tool_choice: Unserved
    tools: Unserved
    verbosity: Unserved
    web_search_options: Unserved

    @model_validator(mode="after")
    def fields_agree(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise combination("top_logprobs", "goes with logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise combination("max_completion_tokens", "and max_tokens say the same; send one")
        return self


class CompletionRequest(Drawing):
    prompt: Prompts = Field(description="Text, or several; no template is put around it.")
    logprobs: Whole | None = Field(None, ge=0, le=20)
    best_of: Unserved
    echo: Literal[False] | None = None
    suffix: Unserved


class AdapterRequest(Wire):
    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="To be asked as model.")
    folder: str = Field(min_length=1, max_length=255, description="Name of a folder in the server's --adapter-root.")


MOST_PARTS = 200_000  # a value takes fifty times its bytes in memory; base64 has no commas
Body = TypeVar("Body", bound=Wire)


def read_body(kind: type[Body], body: bytes) -> Body:
    """Raises Refusal 400 with the first field that is wrong, and how many more are."""
    if (parts := body.count(b",") + body.count(b"[") + body.count(b"{")) > MOST_PARTS:
        raise Refusal(400, f"the body has {parts:,} commas and brackets; at most {MOST_PARTS:,}", code="invalid_value")
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        # Without input values in the message: they are the client's own and may be megabytes.
        raise _refusal(error, body) from error


def _refusal(error: ValidationError, body: bytes) -> Refusal:
    faults = error.errors(include_url=False, include_input=False)
    first = faults[0]
    if first["type"] == "json_invalid":
        message = "the body is no JSON that we can read (broken, not UTF-8, or deeper than 200); send one object"
        return Refusal(400, message, code="invalid_json")
    path = (
        first["ctx"]["field"]
        if first["type"] == "combination"
        else _path(first["loc"], pydantic_core.from_json(body), first["type"] == "missing")
    )
    message = _sentence(path, first["type"], first["msg"], first.get("ctx", {}))
    if len(faults) > 1:
        message += f" ({len(faults) - 1} more like this)" if len(faults) > 2 else " (and one more)"
    code = {"extra_forbidden": "unknown_field", "none_required": "unserved_field", "missing": "missing_field"}
    return Refusal(400, message, param=path or None, code=code.get(first["type"], "invalid_value"))


def _path(location: tuple[int | str, ...], value: Any, missing: bool) -> str:
    """messages.0.content.1.text: of pydantic's way only the steps that the body has, and the field that is missing from it."""
    steps: list[str] = []
    for step in location:
        here = dict(enumerate(value)) if isinstance(value, list) else value
        if isinstance(here, dict) and step in here:
            value = here[step]
            steps.append(str(step))
    if missing:
        steps.append(str(location[-1]))
    return ".".join(_short(step) for step in steps)


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:60]}…"


def _sentence(path: str, kind: str, message: str, context: dict[str, Any]) -> str:
    match kind:
        case "extra_forbidden":
            return f'there is no field "{path}"; take it out (/openapi.json lists what is served)'
        case "none_required":
            return f'"{path}" is not served; take it out'
        case "literal_error" if context.get("expected") == "False":
            return f'"{path}" is not served; take it out, or send false'
        case "combination":
            return f'"{path}" {message}'
        case "missing":
            return f'"{path}" is missing; send it'
        case "union_tag_invalid":
            return f'"{path}" is of a kind that is not served; there are {context.get("expected_tags", "others")}'
        case "model_type" | "model_attributes_type" | "dict_type" if not path:
            return "the body must be one JSON object"
    words = message.replace("Input should", "must", 1).replace(" after validation", "", 1)
    words = re.sub("^(List|String|Dictionary) should", "must", words)
    return f'"{path}": {words}' if path else words
