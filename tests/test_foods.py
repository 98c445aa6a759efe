"""The shipped foods: enough of them, each drawn in every style, named in two languages, small enough to ship."""

import re

import pytest
from PIL import Image

from tessella.errors import DataError
from tessella.foods import FOLDER, STYLES, Food, foods, picture

LIMIT_BYTES = 6 * 2**20


def test_at_least_a_hundred_foods_in_four_styles():
    assert len(foods()) >= 100
    assert len(STYLES) >= 4


def test_every_food_is_drawn_in_every_style_on_white():
    for style in STYLES:
        for food in foods():
            with Image.open(picture(food, style)) as image:
                assert image.mode == "RGB" and image.size == (144, 144), (style, food.key)
                assert min(image.getpixel((0, 0))) > 245, (style, food.key)
                assert min(low for low, _ in image.getextrema()) < 240, (style, food.key)  # something is drawn


def test_names_tell_the_foods_apart_in_both_languages():
    assert len({f.key for f in foods()}) == len({f.english for f in foods()}) == len({f.chinese for f in foods()}) == len(foods())
    for food in foods():
        assert re.fullmatch(r"[\u4e00-\u9fff]+", food.chinese), food
        assert food.english.strip() == food.english and food.english, food


def test_a_known_food_has_its_names():
    assert Food("red-apple", "red apple", "红苹果") in foods()


def test_styles_differ_in_their_pixels():
    for food in foods():
        assert len({picture(food, style).read_bytes() for style in STYLES}) == len(STYLES), food.key


def test_the_pictures_are_small_enough_to_ship_and_none_lies_unused():
    files = sorted(p for p in FOLDER.rglob("*") if p.is_file())
    assert sum(p.stat().st_size for p in files) <= LIMIT_BYTES
    assert set(files) == {picture(f, s) for f in foods() for s in STYLES} | {FOLDER / "foods.json"}


def test_an_unknown_style_or_food_is_told_by_name():
    with pytest.raises(DataError, match=r"'oil'.*twemoji"):
        picture(foods()[0], "oil")
    with pytest.raises(DataError, match=r"'stone'"):
        picture(Food("stone", "stone", "石头"), STYLES[0])
