"""What is right: how an answer is compared with the accepted ones, and how sure a score is.

In: an answer's text and a tuple of accepted texts (synonyms: the best one counts).  Out: a score in [0, 1].
Also the Wilson interval of a share and McNemar's test between two models on the same items.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Z_95 = 1.959963984540054  # two-sided 95 % of a normal distribution
RIGHT_FROM = 0.5  # a graded score counts as right from here on; exact, contains and choice are 0 or 1 anyway

_KEPT_MARKS = frozenset("%#&@")  # punctuation by Unicode's table, but part of a meaning: "50 %", "C#"
_DROPPED_MARKS = frozenset("'\u2018\u2019`\u02bc")  # "shepherd's pie" is "shepherds pie", not "shepherd s pie"
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_ARTICLE = re.compile(r"^(?:a|an|the) (?=.)")
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_CJK_SPACE = re.compile(rf"(?<=[{_CJK}]) | (?=[{_CJK}])")


def normalise_answer(text: str) -> str:
    """One spelling for what is the same answer.

    Full-width forms become half-width (NFKC), case is folded, punctuation of any script becomes a space (a point
    between digits and a minus before one stay), spaces are collapsed and dropped beside Chinese and Japanese
    characters, and one leading article goes. A text of punctuation alone is left as it is.
    """
    folded = unicodedata.normalize("NFKC", text).casefold().strip()
    folded = _THOUSANDS.sub("", folded)
    plain = "".join(_mark(folded, at) for at in range(len(folded)))
    plain = _CJK_SPACE.sub("", " ".join(plain.split()))
    return _ARTICLE.sub("", plain) or folded


def _mark(text: str, at: int) -> str:
    """The character at a place, or what stands for it."""
    mark = text[at]
    if mark in _DROPPED_MARKS:
        return ""
    if not unicodedata.category(mark).startswith(("P", "C", "Z")) or mark in _KEPT_MARKS:
        return mark
    digit_before, digit_after = at > 0 and text[at - 1].isdigit(), text[at + 1 : at + 2].isdigit()
    number_point = mark == "." and digit_before and digit_after
    minus = mark == "-" and digit_after and (at == 0 or text[at - 1].isspace())
    return mark if number_point or minus else " "


def exact(answer: str, accepted: Sequence[str]) -> float:
    """1 when the normalised answer is one of the accepted ones."""
    said = normalise_answer(answer)
    return float(any(said == normalise_answer(text) for text in accepted))


def contains(answer: str, accepted: Sequence[str]) -> float:
    """1 when an accepted text stands in the answer as whole words (in Chinese: as characters). "Not X" contains X."""
    said = normalise_answer(answer)
    return float(any(_stands_in(normalise_answer(text), said) for text in accepted))


def _stands_in(part: str, whole: str) -> bool:
    at = whole.find(part)
    while at >= 0:
        if not _runs_on(whole[at - 1 : at], part[0]) and not _runs_on(part[-1], whole[at + len(part) : at + len(part) + 1]):
            return True
        at = whole.find(part, at + 1)
    return False


def _runs_on(left: str, right: str) -> bool:
    """Whether two neighbours belong to one word; characters of a script without spaces never do."""
    return all(mark.isalnum() and not re.match(f"[{_CJK}]", mark) for mark in (left, right))


def choice_letter(text: str, letters: str = "ABCD") -> str | None:
    """The first of the letters that stands alone, None when there is none: an answer that names no choice is wrong.

    Full-width letters count. A small letter counts only when it is the whole answer, since "a" is mostly an article.
    FoodieQA's own script draws a random choice instead of None; that makes scores depend on luck.
    """
    half = unicodedata.normalize("NFKC", text).strip()
    alone = "".join(mark for mark in half if mark.isalnum()).upper()
    if len(alone) == 1 and alone in letters:
        return alone
    found = re.search(rf"(?<![A-Za-z0-9])[{re.escape(letters)}](?![A-Za-z0-9'\u2019])", half)
    return found.group() if found else None


def choice(answer: str, accepted: Sequence[str]) -> float:
    """1 when the letter that the answer names first is the letter of an accepted answer."""
    letter = choice_letter(answer)
    return float(letter is not None and any(letter == choice_letter(text) for text in accepted))


def anls(answer: str, accepted: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity: 1 - distance / longer length, 0 below one half; the best synonym.

    Source: Biten et al., Scene Text Visual Question Answering, arXiv:1905.13648.
    """
    said = _spaced(answer)
    similarities = [_similarity(said, _spaced(text)) for text in accepted]
    best = max(similarities, default=0.0)
    return best if best >= 0.5 else 0.0


def _spaced(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _similarity(a: str, b: str) -> float:
    longer = max(len(a), len(b))
    return 1.0 - edit_distance(a, b) / longer if longer else 1.0


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance: the fewest characters put in, taken out or changed that turn a into b."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]


def said_letter(text: str) -> str:
    """The choice letter for the table of confusions; "(no letter)" where there is none."""
    return choice_letter(text) or "(no letter)"


@dataclass(frozen=True)
class Metric:
    """A way to score one answer, and how answers are named in the table of confusions."""

    name: str
    score: Callable[[str, Sequence[str]], float]
    read: Callable[[str], str]
    about: str


METRICS = {
    "exact": Metric("exact", exact, normalise_answer, "the answer equals an accepted one after normalisation"),
    "contains": Metric("contains", contains, normalise_answer, "an accepted answer stands in the answer as whole words"),
    "choice": Metric("choice", choice, said_letter, "the first letter A to D in the answer; none is wrong"),
    "anls": Metric("anls", anls, normalise_answer, "edit similarity to the nearest accepted answer, 0 below one half"),
}


class Interval(NamedTuple):
    """A 95 % interval of a share."""

    low: float
    high: float

    def apart(self, other: "Interval") -> bool:
        """Whether the two do not touch."""
        return self.high < other.low or other.high < self.low


def wilson(score_sum: float, total: int, z: float = Z_95) -> Interval:
    """Wilson's score interval of score_sum / total; (0, 1) when there is nothing.

    For graded scores in [0, 1] it is too wide rather than too narrow: their variance is at most that of right-or-wrong.
    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    assert 0 <= score_sum <= total, f"wilson: {score_sum} of {total}"
    if total == 0:
        return Interval(0.0, 1.0)
    share, pull = score_sum / total, z * z / total
    middle = (share + pull / 2) / (1 + pull)
    half = z * math.sqrt(share * (1 - share) / total + pull / (4 * total)) / (1 + pull)
    # At the very ends the formula gives 0 and 1 up to rounding; say them exactly.
    low = 0.0 if score_sum == 0 else max(0.0, middle - half)
    high = 1.0 if score_sum == total else min(1.0, middle + half)
    return Interval(low, high)


class McNemar(NamedTuple):
    """Do two models differ on the same items? Counts of items that one alone got right, and two-sided p-values."""

    only_first: int
    only_this: int
    p_exact: float
    p_mid: float


def mcnemar(first: Sequence[bool], this: Sequence[bool]) -> McNemar:
    """McNemar's test from right-or-wrong of two models, item by item.

    p_exact = 2 P(X <= k), at most 1, with X binomial(n, 1/2) and k the smaller of the two counts; p_mid = 2 P(X <= k) -
    P(X = k), which is less timid. Source: Fagerland, Lydersen, Laake 2013, doi:10.1186/1471-2288-13-91.
    """
    assert len(first) == len(this), f"mcnemar: {len(first)} and {len(this)} items"
    only_first = sum(a and not b for a, b in zip(first, this, strict=True))
    only_this = sum(b and not a for a, b in zip(first, this, strict=True))
    n, k = only_first + only_this, min(only_first, only_this)
    term = tail = 1  # binomial coefficients as whole numbers: exact for any n
    for i in range(k):
        term = term * (n - i) // (i + 1)
        tail += term
    return McNemar(only_first, only_this, min(1.0, 2 * tail / 2**n), min(1.0, (2 * tail - term) / 2**n))
