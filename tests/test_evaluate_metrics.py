"""What is right, and how sure a score is: normalisation, letters, similarity, intervals, McNemar."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessella.evaluate.metrics import (
    Interval,
    anls,
    choice,
    choice_letter,
    contains,
    edit_distance,
    exact,
    mcnemar,
    normalise_answer,
    wilson,
)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("Pizza.", "pizza"),
        ("  A  hot-dog! ", "hot dog"),
        ("The Shepherd’s pie", "shepherds pie"),
        ("宫保鸡丁。", "宫保鸡丁"),
        ("“宫保 鸡丁”！", "宫保鸡丁"),
        ("ＡＢＣ１２３", "abc123"),
        ("（苹果）", "苹果"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("-4", "-4"),
        ("**Pizza**", "pizza"),
        ("CAFÉ", "cafe\u0301"),
    ],
)
def test_one_spelling_for_the_same_answer(said, meant):
    assert exact(said, [meant]) == 1


@pytest.mark.parametrize(
    ("said", "other"), [("3.5", "35"), ("-4", "4"), ("C#", "C"), ("苹果", "青苹果"), ("", "pizza"), ("?", "!")]
)
def test_different_answers_stay_different(said, other):
    assert exact(said, [other]) == 0


def test_any_synonym_counts_in_every_metric():
    for metric in (exact, contains, anls):
        assert metric("soda", ["pop", "soda"]) == 1
        assert metric("soda", ["pop", "lemonade"]) == 0
    assert choice("B", ["A", "B"]) == 1


@given(st.text())
def test_any_text_is_right_against_itself_and_normalises_without_stray_spaces(text):
    once = normalise_answer(text)
    assert not once.startswith(" ") and not once.endswith(" ") and "  " not in once
    assert exact(text, [text]) == 1
    if text.strip():
        assert contains(text, [text]) == 1


def test_contains_wants_whole_words_but_chinese_characters_anywhere():
    assert contains("I think it is a pizza, yes", ["Pizza"]) == 1
    assert contains("a pineapple", ["apple"]) == 0
    assert contains("15", ["5"]) == 0
    assert contains("two apples and an apple", ["apple"]) == 1
    assert contains("图中的菜是宫保鸡丁。", ["宫保鸡丁"]) == 1
    assert contains("答案是pizza吗", ["pizza"]) == 1


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b.", "B"),
        ("Ｃ", "C"),
        ("（D）", "D"),
        ("选B，图中的菜是麻婆豆腐", "B"),
        ("The answer is C because A is wrong", "C"),
        ("B. mapo tofu", "B"),
        ("Apple or Banana", None),
        ("it is a dish", None),
        ("E", None),
        ("", None),
        ("宫保鸡丁", None),
    ],
)
def test_the_first_letter_that_stands_alone_is_the_choice(text, letter):
    assert choice_letter(text) == letter


def test_an_answer_without_a_letter_is_wrong_every_time():
    assert {choice("I do not know", [letter]) for letter in "ABCD" for _ in range(50)} == {0.0}


def test_anls_is_one_for_equal_half_at_the_limit_and_nothing_below():
    assert anls("Hello World", ["hello  world"]) == 1
    assert anls("abcd", ["abxy"]) == 0.5
    assert anls("abcd", ["axyz"]) == 0
    assert anls("hella", ["bye", "hello"]) == pytest.approx(0.8)


@given(st.text(max_size=8), st.text(max_size=8), st.text(max_size=8))
def test_edit_distance_is_a_distance(a, b, c):
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))


def test_wilson_gives_the_published_numbers():
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for right, total, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(right, total) == pytest.approx((low, high), abs=6e-5)
    assert wilson(0, 0) == (0, 1)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_mirrors(case):
    right, total = case
    low, high = wilson(right, total)
    assert 0 <= low <= right / total <= high <= 1
    mirrored = wilson(total - right, total)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_intervals_are_apart_only_when_they_do_not_touch():
    assert Interval(0.1, 0.2).apart(Interval(0.3, 0.4)) and Interval(0.3, 0.4).apart(Interval(0.1, 0.2))
    assert not Interval(0.1, 0.3).apart(Interval(0.3, 0.4))


def test_mcnemar_equals_the_binomial_sum_and_is_symmetric():
    for b in range(12):
        for c in range(12):
            first, this = [True] * b + [False] * c + [True, False], [False] * b + [True] * c + [True, False]
            found = mcnemar(first, this)
            n, k = b + c, min(b, c)
            tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
            assert (found.only_first, found.only_this) == (b, c)
            assert found.p_exact == pytest.approx(min(1, 2 * tail))
            assert found.p_mid == pytest.approx(min(1, 2 * tail - math.comb(n, k) / 2**n))
            back = mcnemar(this, first)
            assert (back.p_exact, back.p_mid) == (found.p_exact, found.p_mid)


def test_mcnemar_stays_exact_over_thousands_of_items():
    found = mcnemar([True] * 2000 + [False] * 2400, [False] * 2000 + [True] * 2400)
    # Normal approximation with continuity correction: z = 399 / sqrt(4400), p = 1.8e-9.
    assert found.p_exact == pytest.approx(math.erfc(399 / math.sqrt(4400) / math.sqrt(2)), rel=0.05)
    assert mcnemar([True] * 3, [True] * 3).p_exact == 1
