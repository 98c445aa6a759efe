"""The data of a run: read whole, or left where it lies.

In: a recipe.  Out: RecipeData: samples to learn from, samples held out, and the ledger of both.
"""

from dataclasses import replace

from tessella.inputs import Inputs
from tessella.train.augment import may_mirror
from tessella.train.dataset import Ledger, RecipeData, read_recipe_data
from tessella.train.multitask.samples import with_scenes
from tessella.train.preflight import look
from tessella.train.recipe import Recipe
from tessella.train.streamed import Streamed


def supply(recipe: Recipe, inputs: Inputs) -> RecipeData:
    """What a run learns from. Raises DataError as read_dataset does."""
    if recipe.scenes or recipe.coco or recipe.captions:
        return with_scenes(recipe, inputs)
    if not recipe.stream:
        data = read_recipe_data(recipe, inputs)
        data.ledger.notes += _not_mirrored(recipe, data)
        if recipe.preflight_s:
            data.ledger.notes += look(data, recipe.preflight_s, recipe.limit_megapixels).notes()
        return data
    streamed = Streamed(recipe, inputs)
    ledger = Ledger(len(streamed), notes=[f"{len(streamed):,} rows are streamed: each is looked at when its step comes"])
    if not recipe.held_out_data:
        return RecipeData(streamed, [], ledger)
    held_out = read_recipe_data(replace(recipe, data=recipe.held_out_data, held_out_data=(), held_out=0.0, stream=False), inputs)
    ledger.add(held_out.ledger)
    return RecipeData(streamed, held_out.train, ledger)


def _not_mirrored(recipe: Recipe, data: RecipeData) -> list[str]:
    """A note when "photo" leaves samples as they are handed."""
    if recipe.augment != "photo":
        return []
    still = [sample for sample in data.train if sample.pictures and not may_mirror(sample.messages)]
    if not still:
        return []
    return [f"{len(still):,} samples are never mirrored, for they speak of left or right or hold boxes: as {still[0].place}"]
