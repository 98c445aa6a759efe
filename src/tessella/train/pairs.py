"""Rows of preference: one conversation with an answer that was chosen and one that was rejected.

In: a row with "chosen" and "rejected", and what was asked under any of the names that other rows use, or "prompt".
Out: a row that ends in the chosen answer, and the text of the rejected one.
Source: MMPR of OpenGVLab ({image, question, chosen, rejected}); TRL's conversational form (lists of messages).
"""

from collections.abc import Mapping
from typing import Any

from tessella.errors import DataError


def is_pair(row: Mapping[str, Any]) -> bool:
    return "chosen" in row and "rejected" in row


def split_pair(row: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Raises DataError for answers that are empty, equal or no text, and for a row that asks nothing."""
    chosen, rejected = _answer(row["chosen"], "chosen"), _answer(row["rejected"], "rejected")
    if chosen == rejected:
        raise DataError("equal answers: chosen and rejected are the same text, so nothing is to be preferred")
    rest = {key: value for key, value in row.items() if key not in ("chosen", "rejected", "prompt")}
    asked = row.get("prompt", row["chosen"][:-1] if isinstance(row["chosen"], list) else None)
    if isinstance(asked, str) and asked:
        rest["question"] = asked
    elif isinstance(asked, list) and asked:
        rest["messages"] = asked
    if "conversations" in rest:
        return {**rest, "conversations": [*rest["conversations"], {"from": "gpt", "value": chosen}]}, rejected
    if "messages" in rest:
        return {**rest, "messages": [*rest["messages"], {"role": "assistant", "content": chosen}]}, rejected
    if "question" not in rest:
        raise DataError(f"no question: the pair has {', '.join(row)}; give question, prompt, messages or conversations")
    return {**rest, "answer": chosen}, rejected


def _answer(said: Any, name: str) -> str:
    """A text, or the content of the last of a list of messages."""
    last = said[-1] if isinstance(said, list) and said else said
    text = last.get("content", last.get("value")) if isinstance(last, Mapping) else last
    if not isinstance(text, str) or not text.strip():
        raise DataError(f'empty answer: "{name}" must be a text, or messages that end in one; it is {str(said)[:60]!r}')
    return text
