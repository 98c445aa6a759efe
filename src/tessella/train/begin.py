"""What a run begins with: the model as it is to be taught, and the adapter that is gone on with, where there is one.

In: a recipe.  Out: Loaded, and the fitted Adapter whose tensors the run begins at, or None.
"""

from pathlib import Path

from tessella.checkpoint.adapters import is_adapter, learned_in, read_adapter, read_adapter_config
from tessella.checkpoint.lowrank import Adapter, fit
from tessella.checkpoint.names import native_layout
from tessella.checkpoint.read import Loaded, load, use_routing
from tessella.checkpoint.routing import read_routing, routing_in
from tessella.errors import ConfigError
from tessella.model.device import choose_device, choose_dtype
from tessella.train.lora import LAYERS
from tessella.train.nf4 import quantise_layers
from tessella.train.recipe import Recipe


def load_to_teach(recipe: Recipe) -> tuple[Loaded, Adapter | None]:
    """The model of a recipe. With further "same" the adapter that it names is left out of the weights and given beside them.

    Raises CheckpointError, ConfigError.
    """
    device = choose_device(recipe.device)
    dtype = str(choose_dtype(recipe.dtype, device)).removeprefix("torch.")
    first = "cpu" if recipe.quantise else recipe.device  # the whole model may not fit where its four bits do
    loaded = load(base_of(recipe), device=first, dtype=dtype, max_tiles=recipe.max_tiles, system=recipe.system)
    folder, start = continued(recipe), None
    if folder is not None:
        beside = routing_in(folder)
        if beside is not None:
            language = loaded.config.language
            use_routing(loaded, read_routing(beside, language.vocab_size, language.hidden_size).to(loaded.model.device))
        named = loaded.model.named_parameters()
        shapes = {name: tuple(weight.shape) for name, weight in named if not name.startswith("routing.")}
        start = fit(read_adapter(folder), shapes, loaded.config.language, native_layout(loaded.config))
    if recipe.quantise:
        # The head stays as it is: it has no LoRA to mend what four bits lose.
        begins = {"language": LAYERS, "tower": "vision_model.encoder.layers."}
        quantise_layers(loaded.model, [begins[part] for part in recipe.quantise], device)
        loaded.model.to(device)
    return loaded, start


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
