"""A request's messages become what inputs.py takes: turns with picture marks, and the pictures in their order.

In: ChatMessages.  Out: Messages and Shown pictures, each with the field that it came from.
Pictures of a turn go where they went in training, before its text; only where one stands between two texts do the marks stay
where the parts were.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tessella.chat import IMAGE_MARK, Message, place_marks
from tessella.server.refusal import Refusal
from tessella.server.wire import ChatMessage, ImagePart, Part, TextPart


@dataclass(frozen=True)
class Shown:
    """One picture, not yet fetched or opened. max_tiles: of this one; None as the model says."""

    url: str
    where: str  # messages.0.content.1.image_url.url
    max_tiles: int | None


def conversation(messages: Sequence[ChatMessage], max_tiles: int | None) -> tuple[list[Message], list[Shown]]:
    """Raises Refusal 400: a picture that is not a user's, text that holds the mark of a picture."""
    turns: list[Message] = []
    shown: list[Shown] = []
    for number, message in enumerate(messages):
        where = f"messages.{number}.content"
        role = "system" if message.role == "developer" else message.role
        parts = [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        _check_parts(parts, role, where)
        text = _text(parts, first_number=len(shown) + 1)
        turns.append(Message(role, text))
        shown += [
            Shown(part.image_url.url, f"{where}.{index}.image_url.url", 1 if part.image_url.detail == "low" else max_tiles)
            for index, part in enumerate(parts)
            if isinstance(part, ImagePart)
        ]
    return turns, shown


def _check_parts(parts: Sequence[Part], role: str, where: str) -> None:
    for part in parts:
        if isinstance(part, ImagePart) and role != "user":
            raise Refusal(
                400, f"{where}: a picture of the {role}; only the user shows pictures", param=where, code="invalid_value"
            )
        if isinstance(part, TextPart) and role == "user" and IMAGE_MARK in part.text:
            message = f'{where}: the text holds "{IMAGE_MARK}", the mark of a picture; write it otherwise'
            raise Refusal(400, message, param=where, code="invalid_value")


def _text(parts: Sequence[Part], first_number: int) -> str:
    kinds = [isinstance(part, ImagePart) for part in parts]
    count = sum(kinds)
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    leading = kinds == sorted(kinds, reverse=True)  # all pictures, then all texts
    trailing = kinds == sorted(kinds)
    if leading or trailing:
        return place_marks("\n".join(texts), count, first_number) if count else "\n".join(texts)
    return "\n".join(part.text if isinstance(part, TextPart) else IMAGE_MARK for part in parts)
