"""FoodieQA's single-picture questions (SIVQA) become drafts, as the tutorial prepares them or with the choices shown.

In: a row {question, choices, answer, question_en, choices_en, food_meta {food_name, food_file}}.  Out: one or more drafts a row.
A split is made by dish: questions about one dish never stand on both sides.
Source: lyan62/FoodieQA (CC BY-NC-ND 4.0, never shipped here); the tutorial's process_food.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tessella.chat import Message, place_marks
from tessella.errors import DataError
from tessella.train.readers import Draft, locate

LETTERS = "ABCD"
LETTER_ONLY = {"zh": "请直接回答选项字母。", "en": "Answer with the option's letter from the given choices directly."}
IN_WORDS = {"zh": "{choice}，图中的菜是{dish}", "en": "{choice}. The dish in the picture is {dish}"}


def is_sivqa(row: Mapping[str, Any]) -> bool:
    """True for a row that only FoodieQA has."""
    return "food_meta" in row and "choices" in row


def drafts_of_sivqa(place: str, row: Mapping[str, Any], image_root: Path, *, language: str, choices: str) -> list[Draft]:
    """One row -> a draft for each asked language and form. Raises DataError with the reason."""
    languages = {"auto": ("zh",), "both": ("zh", "en")}.get(language, (language,))
    forms = ("hidden", "shown") if choices == "both" else (choices,)
    meta = row.get("food_meta")
    if not isinstance(meta, Mapping):
        raise DataError("no SIVQA item: food_meta is missing; the other FoodieQA tasks have no answer about one picture")
    dish, name = _text(meta, "food_name"), _text(meta, "food_file")
    picture = locate(name, image_root)
    drafts = []
    for tongue in languages:
        suffix = "" if tongue == "zh" else "_en"
        question, options = _text(row, f"question{suffix}"), _options(row, f"choices{suffix}")
        right = _right(row, len(options))
        for form in forms:
            if form == "shown":
                listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True))
                asked, answer = f"{question}\n{listed}\n{LETTER_ONLY[tongue]}", LETTERS[right]
            else:
                asked, answer = question, IN_WORDS[tongue].format(choice=options[right], dish=dish)
            messages = (Message("user", place_marks(asked, 1)), Message("assistant", answer))
            drafts.append(Draft(place, messages, (picture,), (name,), group=dish, label=dish))
    return drafts


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"no {name}: it is {str(value)[:40]!r}, must be text")
    return value.strip()


def _options(row: Mapping[str, Any], name: str) -> list[str]:
    value = row.get(name)
    whole = isinstance(value, list) and len(value) == len(LETTERS) and all(isinstance(option, str) and option for option in value)
    if not isinstance(value, list) or not whole:
        raise DataError(f"no {name}: it is {str(value)[:40]!r}, must be a list of {len(LETTERS)} texts")
    return value


def _right(row: Mapping[str, Any], options: int) -> int:
    """FoodieQA writes the answer as "0" to "3"."""
    answer = str(row.get("answer")).strip()
    if answer not in [str(index) for index in range(options)]:
        raise DataError(f'wrong answer index: answer is "{answer[:40]}", must be 0 to {options - 1}')
    return int(answer)
