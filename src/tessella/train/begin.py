"""What a run begins with: the model as it is to be taught, and the adapter that is gone on with, where there is one.

In: a recipe.  Out: Loaded, and the fitted Adapter whose tensors the run begins at, or None.
"""

from pathlib import Path

from tessella.checkpoint.adapters import is_adapter, learned_in, read_adapter, read_adapter_config
from tessella.checkpoint.lowrank import Adapter, fit
from tessella.checkpoint.names import native_layout
from tessella.checkpoint.read import Loaded, load
from tessella.errors import ConfigError
from tessella.train.recipe import Recipe


def load_to_teach(recipe: Recipe) -> tuple[Loaded, Adapter | None]:
    """The model of a recipe. With further "same" the adapter that it names is left out of the weights and given beside them.

    Raises CheckpointError, ConfigError.
    """
    loaded = load(base_of(recipe), device=recipe.device, dtype=recipe.dtype, max_tiles=recipe.max_tiles, system=recipe.system)
    folder = continued(recipe)
    if folder is None:
        return loaded, None
    shapes = {name: tuple(weight.shape) for name, weight in loaded.model.named_parameters()}
    return loaded, fit(read_adapter(folder), shapes, loaded.config.language, native_layout(loaded.config))


def continued(recipe: Recipe) -> Path | None:
    """The adapter folder that is taught further itself; None when the recipe does not ask for that.

    Raises ConfigError when model is no adapter.
    """
    if recipe.further == "on_top":
        return None
    folder = learned_in(Path(recipe.model).expanduser())
    if not is_adapter(folder):
        raise ConfigError(f'further is "same", but model is "{recipe.model}", which is no adapter; give the folder of one')
    return folder


def base_of(recipe: Recipe) -> str:
    """The model that what is written belongs on: the recipe's, or with further "same" the base that its adapter names.

    Raises ConfigError when the adapter names none.
    """
    folder = continued(recipe)
    if folder is None:
        return recipe.model
    base = str(read_adapter_config(folder).get("base_model_name_or_path") or "")
    if not base:
        raise ConfigError(f"{folder} does not say which base it was taught on; say --further on_top and name the base yourself")
    return base
