"""Recipes: what is written is read back, what is wrong is named, what may change on resume is known."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessella.errors import ConfigError
from tessella.train.recipe import FREE_ON_RESUME, RANGES, Recipe, load_recipe

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


@given(
    model=TEXT,
    data=st.lists(TEXT.map(Path), max_size=3),
    system=st.none() | TEXT,
    questions=st.lists(TEXT, max_size=3),
    rate=st.floats(1e-12, 1.0),
    max_tiles=st.none() | st.integers(1, 40),
    resume=st.booleans(),
)
def test_a_recipe_written_as_toml_is_read_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    model: str,
    data: list[Path],
    system: str | None,
    questions: list[str],
    rate: float,
    max_tiles: int | None,
    resume: bool,
) -> None:
    recipe = Recipe(
        model=model,
        data=tuple(data),
        system=system,
        questions=tuple(questions),
        learning_rate=rate,
        max_tiles=max_tiles,
        resume=resume,
    )
    path = written(tmp_path_factory.mktemp("recipe"), recipe.to_toml())
    assert load_recipe(path) == recipe


def test_toml_types_become_the_fields_types_and_overrides_win(tmp_path: Path) -> None:
    path = written(tmp_path, 'data = ["a.json", "b"]\nlearning_rate = 1\nbetas = [0, 0.95]\nheld_out = 7\nmax_tiles = 3\n')
    recipe = load_recipe(path, {"max_tiles": 6, "seed": 4})
    assert recipe.data == (Path("a.json"), Path("b"))
    assert (recipe.learning_rate, recipe.betas, recipe.held_out) == (1.0, (0.0, 0.95), 7.0)
    assert (recipe.max_tiles, recipe.seed) == (6, 4)
    assert recipe.epochs == Recipe().epochs


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rat = 1e-4", ['"learning_rat"', '"learning_rate"']),
        ("zzzzzzzzqq = 1", ["zzzzzzzzqq", "known are"]),
        ("seed = \nepochs = 1", ["line 1"]),
        ('data = "a.json"', ["data", "a list"]),
        ("seed = 1.5", ["seed", "1.5", "whole number"]),
        ("resume = 1", ["resume", "true or false"]),
        ('epochs = "3"', ["epochs", "a number"]),
        ("epochs = nan", ["epochs", "nan"]),
        ("seed = true", ["seed", "whole number"]),
        ('language = "qlora"', ["qlora", '"lora"', '"frozen"', '"full"']),
        ("betas = [0.9]", ["betas", "list of 2"]),
        ("betas = [0.9, 1.0]", ["betas", "[0, 1)"]),
        ("max_tiles = 41", ["max_tiles", "41", "40"]),
        ("learning_rate = 0", ["learning_rate", "above 0"]),
        ("held_out = 1.5", ["held_out", "1.5", "share below 1"]),
        ('lora_targets = ["lm_head"]', ["lm_head", "no LoRA"]),
        ('lora_targets = ["q_proj", "language_model.output"]', ["output", "no LoRA"]),
        ("lora_targets = []", ["targets are empty"]),
        ('language = "frozen"\nprojector = "frozen"', ["all frozen"]),
        ('answer = "food"', ["{name}"]),
        ('data = ["a"]\nrepeat = [1, 2]', ["2 numbers for 1"]),
        ('data = ["a"]\nrepeat = [-1]', ["repeat", "-1"]),
    ],
)
def test_a_wrong_recipe_is_refused_with_value_and_way_out(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(written(tmp_path, text))
    for word in words:
        assert word in str(caught.value)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.toml: no such recipe"):
        load_recipe(tmp_path / "nothing.toml")


@pytest.mark.parametrize("name", sorted(RANGES))
def test_every_bound_is_kept_by_python_too(name: str) -> None:
    bounds = RANGES[name]
    wrong = bounds.low if bounds.above else bounds.low - 1
    with pytest.raises(ConfigError, match=name):
        Recipe(**{name: wrong})


def test_the_fingerprint_changes_with_what_is_learned_and_only_with_that() -> None:
    plain = Recipe()
    assert replace(plain, output=Path("elsewhere"), resume=True, tokens_per_pass=512, workers=0, device="cpu").fingerprint() == (
        plain.fingerprint()
    )
    assert Recipe(epochs=1).fingerprint() == Recipe(epochs=1.0).fingerprint()
    for changed in (
        replace(plain, seed=1),
        replace(plain, data=(Path("x"),)),
        replace(plain, lora_rank=8),
        replace(plain, system=""),
    ):
        assert changed.fingerprint() != plain.fingerprint()


def test_changes_from_names_what_differs() -> None:
    before = Recipe(learning_rate=1e-4)
    after = replace(before, learning_rate=2e-4, output=Path("elsewhere"))
    assert after.changes_from(before.settled()) == ("learning_rate was 0.0001, is 0.0002",)
    assert before.changes_from(before.settled()) == ()


def test_every_name_that_is_free_on_resume_is_a_field() -> None:
    assert {field.name for field in fields(Recipe)} >= FREE_ON_RESUME


def test_features_are_kept_only_where_they_cannot_change() -> None:
    assert Recipe().caches_features
    assert not Recipe(tower="lora").caches_features
    assert not Recipe(augment="light").caches_features
    assert not Recipe(cache_features=False).caches_features
