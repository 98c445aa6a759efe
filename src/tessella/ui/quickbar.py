"""The quick bar as HTML: kinds, the pictures of one kind, sample questions.

In: rows, which of them is open, a language.  Out: HTML whose buttons say by data-… what they are; quickbar.js tells the page.
"""

from collections.abc import Sequence
from functools import lru_cache
from html import escape
from pathlib import Path

from tessella.ui.pictures import thumbnail
from tessella.ui.shelf import Row
from tessella.ui.trouble import Trouble
from tessella.ui.words import QUESTIONS, say


@lru_cache(maxsize=1024)  # about 4 KB each
def _thumbnail(path: Path) -> str:
    """A data: URL, so that a password on the page guards it too; "" for what is no picture."""
    try:
        return thumbnail(path)
    except Trouble:  # a file of the person's own folder that is broken: it is not offered
        return ""


def quick_bar(rows: Sequence[Row], kind: int, language: str) -> str:
    """Buttons with data-kind, data-picture and data-question, each a number."""
    kinds = "".join(
        f'<button type="button" data-kind="{number}" aria-pressed="{is_open}">{escape(row.names[language])}</button>'
        for number, row in enumerate(rows)
        if (is_open := "true" if number == kind else "false")
    )
    pictures = "".join(
        f'<button type="button" data-picture="{number}" title="{name}"><img src="{source}" alt="{name}"></button>'
        for number, item in enumerate(rows[kind].items)
        if (source := _thumbnail(item.path)) and (name := escape(item.names[language]))
    )
    more = f'<span class="more">{say(language, "more", count=rows[kind].more)}</span>' if rows[kind].more else ""
    questions = "".join(
        f'<button type="button" data-question="{number}">{escape(text)}</button>'
        for number, text in enumerate(QUESTIONS[language])
    )
    return (
        f"<details><summary>{say(language, 'quick')}</summary>"
        f'<div class="kinds" role="group" aria-label="{say(language, "kinds")}">{kinds}</div>'
        f'<div class="strip" role="group" aria-label="{say(language, "pictures")}">{pictures}{more}</div></details>'
        f'<div class="questions" role="group" aria-label="{say(language, "questions")}">{questions}</div>'
    )
