"""Turns become HTML that a browser can trust.

In: turns, a language, the folder of drawings.  Out: for each turn its parts; transcript.js puts in the page what has changed.
What a model or a person says goes through Markdown without HTML and without pictures: nothing it says can load or run.
"""

from collections.abc import Sequence
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from markdown_it import MarkdownIt

from tessella.marks import boxes_in
from tessella.ui.boxes import draw, routed_in, without_tags
from tessella.ui.conversation import Answer, Turn
from tessella.ui.words import say

_MARKDOWN = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"]).disable("image")

# Drawn here, so that no font or file is fetched; 24 x 24, strokes in the colour of the text.
ICONS = {
    "copy": "M8 8V4h12v12h-4M4 8h12v12H4z",
    "retry": "M4 12a8 8 0 1 1 3 6.2M4 12V6m0 6h6",
    "edit": "M4 20l1-5L16 4l4 4L9 19z",
    "camera": "M4 8h4l2-3h4l2 3h4v11H4zM12 16.5a3.5 3.5 0 1 0 0-7 3.5 3.5 0 0 0 0 7z",
    "undo": "M9 14L4 9l5-5M4 9h10a6 6 0 0 1 0 12h-3",
}

_OF_THE_SCRIPT = (
    *("conversation", "empty", "send", "keep", "cancel", "copied", "edit", "correct"),
    *("upload", "submit", "stop", "box", "settings", "theme"),  # names for Gradio's own buttons
)


def turns_as_parts(turns: Sequence[Turn], language: str, folder: Path, busy: bool) -> dict[str, Any]:
    """What transcript.js shows: the parts of each turn as HTML, and the words that it needs itself."""
    parts = [
        {
            "question": _question(turn, number, number == len(turns) - 1, language),
            "answers": [
                _answer(turns, number, column, number == len(turns) - 1, language, folder) for column in range(len(turn.answers))
            ],
        }
        for number, turn in enumerate(turns)
    ]
    words = {key: say(language, key) for key in _OF_THE_SCRIPT}
    return {"turns": parts, "busy": busy, "words": words, "language": language}


@lru_cache(maxsize=512)  # the page looks twelve times a second, and only the last answer has changed
def markdown(text: str) -> str:
    """Safe HTML. A link opens in a tab of its own, and does not tell where it was followed from."""
    html: str = _MARKDOWN.render(text)
    return html.replace("<a href=", '<a target="_blank" rel="noopener noreferrer" href=')


def _question(turn: Turn, number: int, last: bool, language: str) -> str:
    shown = "".join(_figure(picture.shown, picture.name) for picture in turn.pictures)
    text = f'<div class="said" data-text="{escape(turn.question)}">{escape(turn.question)}</div>'
    actions = _button("copy", number, 0, language) + _button("edit", number, 0, language)
    actions += _button("undo", number, 0, language) if last else ""
    pictures = f'<div class="shown">{shown}</div>' if shown else ""
    return f'<h3 class="who">{say(language, "you")}</h3>{pictures}{text}<div class="actions">{actions}</div>'


def _answer(turns: Sequence[Turn], number: int, column: int, last: bool, language: str, folder: Path) -> str:
    answer = turns[number].answers[column]
    body = markdown(without_tags(answer.text))
    if not answer.ended and not answer.text:
        body = f'<p class="thinking">{say(language, "thinking")}</p>'
    told = f'<p class="trouble" role="alert">{escape(answer.trouble.sentence(language))}</p>' if answer.trouble else ""
    actions = ""
    if answer.ended:
        actions = _button("copy", number, column, language) + _button("correct", number, column, language, icon="edit")
        actions += _button("retry", number, column, language) if last else ""
    said = f'<div class="said" data-text="{escape(answer.text)}">{body}</div>'
    below = f'<p class="facts">{escape(facts(answer, language))}</p><div class="actions">{actions}</div>'
    drawing = _drawing(turns[: number + 1], answer, language, folder)
    return f'<h3 class="who">{escape(answer.model)}</h3>{said}{drawing}{told}{below}'


def _drawing(turns: Sequence[Turn], answer: Answer, language: str, folder: Path) -> str:
    """Boxes are about the picture that was shown last; a routed model's own pictures stand below. Once the answer has ended."""
    pictures = [picture for turn in turns for picture in turn.pictures]
    found = routed_in(answer.routed)
    boxes = boxes_in(answer.text)
    masks = [np.zeros((1, 1), dtype=np.bool_)] * len(boxes) + found.masks
    boxes += found.boxes
    if not answer.ended:
        return ""
    alt = escape(say(language, "painted"))
    painted = "".join(
        f'<div class="shown"><figure><img src="{escape(one)}" alt="{alt}"></figure></div>' for one in found.pictures
    )
    painted += "".join(f'<p class="trouble">{escape(one)}</p>' for one in found.troubles)
    if not boxes or not pictures:
        return painted
    name = say(language, "boxed", name=pictures[-1].name)
    labels = ", ".join(f"{number} {box.label}" for number, box in enumerate(boxes, start=1) if box.label)
    caption = f"<figcaption>{escape(labels)}</figcaption>" if labels else ""
    return f'<div class="shown boxed">{_figure(draw(pictures[-1], boxes, folder, masks), name, caption)}</div>{painted}'


def _figure(path: Path, name: str, caption: str = "") -> str:
    address = address_of(path)
    image = f'<img src="{address}" alt="{escape(name)}" loading="lazy">'
    return f'<figure><a href="{address}" target="_blank" rel="noopener">{image}</a>{caption}</figure>'


def address_of(path: Path) -> str:
    """Where Gradio serves a file of the page's own folder."""
    return f"gradio_api/file={quote(str(path))}"


def _button(action: str, number: int, column: int, language: str, icon: str = "") -> str:
    return icon_button(
        icon or action, say(language, action), f'data-action="{action}" data-turn="{number}" data-column="{column}"'
    )


def icon_button(icon: str, name: str, data: str) -> str:
    """A button that is a drawing, with its name for those who do not see it."""
    drawn = f'<svg viewBox="0 0 24 24" aria-hidden="true"><path d="{ICONS[icon]}"/></svg>'
    return f'<button type="button" class="icon" {data} aria-label="{name}" title="{name}">{drawn}</button>'


def facts(answer: Answer, language: str) -> str:
    """The numbers under an answer: tokens, tiles, times, and how it ended if not by itself."""
    said = []
    if answer.prompt_tokens is not None:
        said.append(say(language, "prompt_tokens", count=f"{answer.prompt_tokens:,}"))
    if answer.tiles:
        said.append(say(language, "picture_tiles", count=answer.tiles))
    if answer.answer_tokens is not None:
        said.append(say(language, "answer_tokens", count=f"{answer.answer_tokens:,}"))
    if answer.first_token_s is not None:
        said.append(say(language, "first_token", seconds=f"{answer.first_token_s:.2f}"))
    if answer.tokens_a_second is not None:
        rate = answer.tokens_a_second
        said.append(say(language, "rate", rate=f"{rate:.1f}" if rate < 10 else f"{rate:.0f}"))
    if answer.ended in ("stopped", "length"):
        said.append(say(language, answer.ended))
    if answer.corrected:
        said.append(say(language, "corrected"))
    return " · ".join(said)
