"""The recipes that come with the package are read, and say what their sources say."""

from pathlib import Path

import pytest

from tessella.checkpoint.published import PUBLISHED
from tessella.train.recipe import load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
SIZES = ("1b", "2b", "4b", "8b", "26b", "40b", "76b")
EVERY = sorted(RECIPES.glob("*.toml")) + sorted((RECIPES / "internvl2").glob("*.toml"))


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_read_and_names_a_model_that_there_is(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.model == "tessella-nano" or recipe.model.removeprefix("OpenGVLab/") in PUBLISHED


@pytest.mark.parametrize("size", SIZES)
def test_internvls_recipes_are_there_for_each_size(size: str) -> None:
    lora, full = (load_recipe(RECIPES / "internvl2" / f"{size}_{way}.toml") for way in ("lora", "full"))
    name = "Llama3-76B" if size == "76b" else size.upper()
    assert lora.model == full.model == f"OpenGVLab/InternVL2-{name}"
    large = size in ("26b", "40b", "76b")
    assert lora.learning_rate == full.learning_rate == (2e-5 if large else 4e-5)
    assert lora.weight_decay == full.weight_decay == (0.01 if size in ("1b", "2b", "4b") else 0.05)
    assert (lora.lora_rank, lora.lora_alpha, lora.lora_dropout, lora.samples_per_step) == (16, 32.0, 0.05, 16)
    assert (lora.language, lora.projector, lora.tower) == ("lora", "frozen", "frozen")
    assert (full.language, full.projector, full.tower, full.samples_per_step) == ("full", "train", "frozen", 128)


def test_the_tutorials_recipe_takes_its_320_steps() -> None:
    recipe = load_recipe(RECIPES / "internvl2_2b_lora_food.toml")
    assert 256 * recipe.epochs / recipe.samples_per_step == 320
    assert (recipe.lora_rank, recipe.lora_alpha, recipe.learning_rate, recipe.weight_decay) == (128, 256.0, 3e-5, 0.05)
