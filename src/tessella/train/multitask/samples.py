"""Scenes as samples beside those of the data.

In: a recipe.  Out: RecipeData: what the data files hold, then the recipe's scenes; held out are scenes in the style kept apart.
"""

import hashlib
from dataclasses import replace
from pathlib import Path

from tessella.errors import ConfigError
from tessella.foods import STYLES
from tessella.inputs import Inputs, Picture
from tessella.scenes.captions import read_captions
from tessella.scenes.coco import CocoRequest, read_coco
from tessella.scenes.compose import Kit, photos_in
from tessella.scenes.requests import Asks, Request
from tessella.train.dataset import Ledger, RecipeData, Sample, read_recipe_data
from tessella.train.recipe import Recipe


def with_scenes(recipe: Recipe, inputs: Inputs) -> RecipeData:
    """The samples of a recipe's data and its scenes. Raises DataError as read_recipe_data does, unless there are scenes alone."""
    if recipe.stream:
        raise ConfigError("stream and scenes do not go together; leave one of them out")
    data = read_recipe_data(recipe, inputs) if recipe.data else RecipeData([], [], Ledger())
    train = [_taught(request) for request in requests_of(recipe, recipe.scenes)]
    held_out = [sample_of(request) for request in requests_of(recipe, recipe.held_out_scenes, held_out=True)]
    for path in recipe.coco:
        own, kept, ledger = coco_of(recipe, path)
        train, held_out = train + own, held_out + kept
        data.ledger.skipped += ledger.skipped
    for path in recipe.captions:
        drawn, skipped = read_captions(path, recipe.image_root, recipe.limit_megapixels)
        Ledger(len(drawn), skipped).check(str(path), recipe.max_bad_share)
        train += [_taught(one) for one in drawn]
        data.ledger.skipped += skipped
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


def coco_of(recipe: Recipe, path: Path) -> tuple[list[Sample], list[Sample], Ledger]:
    """(to learn from, held out, ledger) of one COCO file; whole pictures are held out, chosen by the seed.

    Raises DataError when too much of it is bad.
    """
    pictures, skipped = read_coco(path, recipe.image_root)
    ledger = Ledger(len(pictures), skipped)
    ledger.check(str(path), recipe.max_bad_share)
    language = "zh" if recipe.question_language == "zh" else "en"
    order = sorted(pictures, key=lambda one: hashlib.sha256(f"{recipe.seed}/{one.path.name}".encode()).digest())
    count = round(recipe.held_out * len(order)) if recipe.held_out < 1 else int(recipe.held_out)
    kept = {one.path for one in order[: min(count, len(order) - 1)]}
    requests = [CocoRequest(one, k, recipe.seed, language, recipe.limit_megapixels) for k, one in enumerate(pictures)]
    train = [_taught(request) for request in requests if request.picture.path not in kept]
    return train, [sample_of(request) for request in requests if request.picture.path in kept], ledger


def _taught(request: Asks) -> Sample:
    """Composed when its turn to be learned from has come."""
    return Sample(request.place, (), (), request.key, request=request)


def sample_of(request: Asks) -> Sample:
    """Composed now."""
    asked = request.make()
    pictures = () if asked.picture is None else (Picture(asked.picture),)
    return Sample(request.place, asked.messages, pictures, request.key, label=asked.kind, truths=asked.truths)
