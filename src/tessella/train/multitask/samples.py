"""Scenes as samples beside those of the data.

In: a recipe.  Out: RecipeData: what the data files hold, then the recipe's scenes; held out are scenes in the style kept apart.
"""

from dataclasses import replace

from tessella.errors import ConfigError
from tessella.foods import STYLES
from tessella.inputs import Inputs, Picture
from tessella.scenes.compose import Kit, photos_in
from tessella.scenes.requests import Request
from tessella.train.dataset import Ledger, RecipeData, Sample, read_recipe_data
from tessella.train.recipe import Recipe


def with_scenes(recipe: Recipe, inputs: Inputs) -> RecipeData:
    """The samples of a recipe's data and its scenes. Raises DataError as read_recipe_data does, unless there are scenes alone."""
    if recipe.stream:
        raise ConfigError("stream and scenes do not go together; leave one of them out")
    data = read_recipe_data(recipe, inputs) if recipe.data else RecipeData([], [], Ledger())
    train = [_taught(request) for request in requests_of(recipe, recipe.scenes)]
    held_out = [sample_of(request) for request in requests_of(recipe, recipe.held_out_scenes, held_out=True)]
    data.ledger.used += len(train) + len(held_out)
    return replace(data, train=[*data.train, *train], held_out=[*data.held_out, *held_out])


def requests_of(recipe: Recipe, count: int, *, held_out: bool = False) -> list[Request]:
    """The first `count` scenes that a recipe teaches; or those held out, which show the style kept for scoring."""
    photos = () if recipe.scene_photos is None else photos_in(recipe.scene_photos)
    kit = Kit(
        styles=STYLES[-1:] if held_out else recipe.scene_styles, photos=photos, most_objects=recipe.scene_objects,
        seed=recipe.seed, foods=recipe.scene_foods, held_out=held_out,
    )  # fmt: skip
    return [Request(kit, number, recipe.scene_kinds) for number in range(count)]


def _taught(request: Request) -> Sample:
    """Composed when its turn to be learned from has come."""
    return Sample(request.place, (), (), request.key, request=request)


def sample_of(request: Request) -> Sample:
    """Composed now."""
    asked = request.make()
    pictures = () if asked.picture is None else (Picture(asked.picture),)
    return Sample(request.place, asked.messages, pictures, request.key, label=asked.kind, truths=asked.truths)
