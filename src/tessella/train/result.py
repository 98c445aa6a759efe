"""What was learned, written for others: an adapter in PEFT's format, or a whole model in the official layout.

In: the masters of the learned parameters, in float32.  Out: output/adapter, or output/model when
the language model was taught whole; with routing, a routing/ folder in either.
"""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from tessella.checkpoint.adapters import AdapterSettings, save_adapter
from tessella.checkpoint.lowrank import Pair
from tessella.checkpoint.names import native_layout
from tessella.checkpoint.read import Loaded, base_fingerprint
from tessella.checkpoint.routing import write_routing
from tessella.checkpoint.weights import entries_of
from tessella.checkpoint.write import write_model
from tessella.train.begin import base_of
from tessella.train.lora import file_name, scale_of
from tessella.train.recipe import Recipe
from tessella.train.taught import Taught

ROUTING = "routing."  # the prefix of what routing learns


def save_result(recipe: Recipe, loaded: Loaded, taught: Taught, learned: dict[str, Tensor]) -> Path:
    """Write what was learned (whole tensors in float32) and give its folder. Raises CheckpointError when it cannot."""
    values = {name: value for name, value in learned.items() if not name.startswith(ROUTING)}
    beside = _routing_writer(loaded, learned)
    if recipe.language == "full":
        entries = entries_of(whole_model(loaded, values, scale_of(recipe)))
        config, folder = loaded.config, recipe.output / "model"
        layout = "official" if config.family == "internvl" else native_layout(config)
        return write_model(
            entries, folder, config, layout=layout, end_ids=loaded.stop_ids, base_folder=loaded.folder, force=True,
            check=beside,
        )  # fmt: skip
    settings = AdapterSettings(
        base_name(base_of(recipe)), recipe.lora_rank, recipe.lora_alpha, recipe.lora_dropout, taught.whole,
        rslora=recipe.rslora, dora=recipe.dora, quantised=recipe.quantise, fingerprint=base_fingerprint(base_of(recipe)),
    )  # fmt: skip
    return save_adapter(recipe.output / "adapter", values, settings, force=True, beside=beside)


def _routing_writer(loaded: Loaded, learned: dict[str, Tensor]) -> Callable[[Path], None] | None:
    """Writes what was learned of routing, or what the model had of it, beside the rest; None for a model without."""
    routing = loaded.model.routing
    if routing is None:
        return None
    values = {name.removeprefix(ROUTING): value for name, value in learned.items() if name.startswith(ROUTING)}

    def write(folder: Path) -> None:
        write_routing(folder, routing, values)

    return write


def base_name(model: str) -> str:
    """What adapter_config.json calls the base: a folder's full path, so that the adapter works from everywhere, or the name."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else model


def whole_model(loaded: Loaded, values: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Every parameter in the model's type, learned ones from their float32 masters, LoRA of the tower merged in float32."""
    merged = {}
    for name, parameter in loaded.model.named_parameters():
        plain = file_name(name)
        if ".lora_" in plain or plain.startswith(ROUTING):
            continue
        value = values.get(plain, parameter.detach())
        module = plain.removesuffix(".weight")
        if f"{module}.lora_A.weight" in values:
            pair = Pair(values[f"{module}.lora_A.weight"], values[f"{module}.lora_B.weight"], scale)
            value = value.float() + pair.delta()
        merged[plain] = value.to(parameter.dtype)
    return merged
