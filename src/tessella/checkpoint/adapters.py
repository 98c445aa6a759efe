"""Adapters in PEFT's file format: read and written without PEFT.

In: a folder with adapter_config.json and adapter_model.safetensors.  Out: an Adapter (lowrank.py), and back.
Keys: base_model.model.<module>.lora_A.weight and .lora_B.weight, with DoRA .lora_magnitude_vector; fully trained modules
(modules_to_save) as base_model.model.<parameter>. Names are ours, the official ones, or those of transformers' own InternVL.
r rank, I inputs, O outputs of a linear layer: A (r, I), B (O, r).
Source: huggingface/peft, save_and_load.py.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tessella.checkpoint.fingerprint import write_fingerprint
from tessella.checkpoint.folder import new_folder
from tessella.checkpoint.lowrank import Adapter, Pair
from tessella.checkpoint.routing import routing_in
from tessella.checkpoint.weights import Weights, entries_of, some, write_file
from tessella.errors import CheckpointError

TAUGHT = "taught.json"
CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
MAGNITUDE = "lora_magnitude_vector"  # DoRA's, (O,)
# Kinds of LoRA that change the arithmetic and that we do not have: refused, never passed over.
REFUSED = (
    *("fan_in_fan_out", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices"),
    *("use_qalora", "alora_invocation_tokens", "arrow_config", "corda_config"),
)
# Modules that are named whole in modules_to_save, by a parameter that tells that all of them is there.
PARENTS = {"mlp1": "mlp1.1.weight", "model.multi_modal_projector": "model.multi_modal_projector.linear_1.weight"}
PARENTS |= {"vision_model": "vision_model.embeddings.class_embedding"}
PARENTS |= {"model.vision_tower": "model.vision_tower.embeddings.cls_token"}


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def learned_in(folder: Path) -> Path:
    """What a person means by the output folder of `finetune`: the adapter/ or model/ in it. Any other folder means itself."""
    if is_adapter(folder) or (folder / "config.json").is_file():
        return folder
    if is_adapter(folder / "adapter"):
        return folder / "adapter"
    return folder / "model" if (folder / "model" / "config.json").is_file() else folder


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The dict of adapter_config.json. Raises CheckpointError."""
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {CONFIG}, so it is no adapter; give the folder that finetune wrote")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); write the adapter again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}, must be an object")
    if raw.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(f'{path}: peft_type is "{raw["peft_type"]}"; we can merge "LORA"')
    refused = [key for key in REFUSED if raw.get(key)]
    if refused or raw.get("bias", "none") != "none":
        what = ", ".join(refused) or f'bias "{raw["bias"]}"'
        raise CheckpointError(f"{path} uses {what}, which we cannot merge; teach a plain LoRA")
    return raw


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter folder. Raises CheckpointError for what is missing, unpaired or not known."""
    raw = read_adapter_config(folder)
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} holds no {WEIGHTS}; write the adapter again (a pickled adapter_model.bin is not opened)")
    weights = Weights([folder / WEIGHTS])
    tensors = {key.removeprefix(PREFIX): weights[key] for key in weights.files}
    pairs, whole = pairs_and_whole(tensors, lambda module, a: _scale(raw, module, a, folder), folder / WEIGHTS)
    bare = [module for module, pair in pairs.items() if (pair.magnitude is None) == bool(raw.get("use_dora"))]
    if bare:
        says = "use_dora, but the weights hold no" if raw.get("use_dora") else "no use_dora, but the weights hold a"
        raise CheckpointError(f"{folder / CONFIG} says {says} lora_magnitude_vector of {some(bare)}; write the adapter again")
    if not pairs and not whole and routing_in(folder) is None:
        raise CheckpointError(f"{folder / WEIGHTS} holds no tensors; teach the adapter again")
    return Adapter(folder, str(raw.get("base_model_name_or_path") or ""), pairs, whole, _quantised(folder))


def _quantised(folder: Path) -> tuple[str, ...]:
    """The parts of the base that were in four bits while the adapter was taught, as a run of ours wrote them beside it."""
    path = folder / TAUGHT
    if not path.is_file():
        return ()
    try:
        return tuple(str(part) for part in json.loads(path.read_text(encoding="utf-8"))["quantised"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not what finetune writes ({error!r}); remove it, the adapter works without") from error


def pairs_and_whole(
    tensors: Mapping[str, Tensor], scale: Callable[[str, Tensor], float], where: Path
) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """Tensors as PEFT names them (its base_model.model. taken away) -> pairs by module, whole tensors by parameter.

    scale: gives a module's factor from its name and its A. Raises CheckpointError for what is unpaired or not known.
    """
    sides: dict[str, dict[str, Tensor]] = {"lora_A": {}, "lora_B": {}, MAGNITUDE: {}}
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, side = name.removesuffix(".weight").removesuffix(".default").rpartition(".")
        if side in sides:
            sides[side][module] = tensor
        elif "lora_" in name:
            raise CheckpointError(f"{where}: {name} is a kind of LoRA tensor that we do not know; teach linear layers only")
        else:
            whole[name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")] = tensor
    alone = sides["lora_A"].keys() ^ sides["lora_B"].keys()
    if alone:
        raise CheckpointError(f"{where}: lora_A and lora_B do not both stand for {some(sorted(alone))}")
    stray = sides[MAGNITUDE].keys() - sides["lora_A"].keys()
    if stray:
        raise CheckpointError(f"{where}: {some(sorted(stray))} have a {MAGNITUDE} and no lora_A")
    pairs = {
        module: Pair(a, sides["lora_B"][module], scale(module, a), sides[MAGNITUDE].get(module))
        for module, a in sides["lora_A"].items()
    }
    return pairs, whole


def _scale(raw: Mapping[str, Any], module: str, a: Tensor, folder: Path) -> float:
    """alpha / r, or alpha / sqrt(r); the patterns of PEFT name modules by the end of their names."""
    rank = _of_module(raw.get("rank_pattern"), module, raw.get("r"))
    alpha = _of_module(raw.get("alpha_pattern"), module, raw.get("lora_alpha"))
    if rank is None or alpha is None:
        raise CheckpointError(f"{folder / CONFIG} names no r or no lora_alpha; write the adapter again")
    if a.dim() != 2 or a.shape[0] != int(rank):
        raise CheckpointError(f"{module}.lora_A is {tuple(a.shape)}, but {CONFIG} says rank {rank}")
    return float(alpha) / (int(rank) ** 0.5 if raw.get("use_rslora") else int(rank))


def _of_module(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for key, value in (pattern or {}).items():
        plain = key.removeprefix("^")  # PEFT writes an exact name as ^name
        if module == plain or module.endswith(f".{plain}"):
            return value
    return default


@dataclass(frozen=True)
class AdapterSettings:
    """What adapter_config.json must say so that PEFT, too, reads the adapter back as it was taught."""

    base: str
    rank: int
    alpha: float
    dropout: float = 0.0
    modules_to_save: tuple[str, ...] = ()  # modules that were trained whole, as "mlp1"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)  # modules with another rank
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)  # and with another alpha
    rslora: bool = False  # scale = alpha / sqrt(rank)
    dora: bool = False
    quantised: tuple[str, ...] = ()  # parts of the base that were in four bits while it was taught
    fingerprint: str = ""  # of the base's weights, where they are known


def settings_of(adapter: Adapter, base: str, fingerprint: str = "") -> AdapterSettings:
    """The settings that describe an adapter: the rank and scale most of its pairs have, and the modules that differ."""
    alphas = {module: (pair.rank, pair.scale * pair.rank) for module, pair in adapter.pairs.items()}
    rank, alpha = Counter(alphas.values()).most_common(1)[0][0] if alphas else (1, 1.0)
    return AdapterSettings(
        base,
        rank,
        alpha,
        modules_to_save=tuple(dict.fromkeys(_saved_module(name, adapter.whole) for name in adapter.whole)),
        rank_pattern={module: own for module, (own, _) in alphas.items() if own != rank},
        alpha_pattern={module: own for module, (_, own) in alphas.items() if own != alpha},
        dora=adapter.has_dora,
        quantised=adapter.quantised,
        fingerprint=fingerprint,
    )


def _saved_module(parameter: str, whole: Mapping[str, Tensor]) -> str:
    for parent, sign in PARENTS.items():
        if parameter.startswith(f"{parent}.") and sign in whole:
            return parent
    return parameter.rpartition(".")[0]


def state_of(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of an adapter as its file names them, without PEFT's base_model.model."""
    state = {f"{module}.lora_A.weight": pair.a for module, pair in adapter.pairs.items()}
    state |= {f"{module}.lora_B.weight": pair.b for module, pair in adapter.pairs.items()}
    state |= {f"{module}.{MAGNITUDE}": pair.magnitude for module, pair in adapter.pairs.items() if pair.magnitude is not None}
    return state | adapter.whole


def save_adapter(
    folder: Path,
    state: Mapping[str, Tensor],
    settings: AdapterSettings,
    *,
    force: bool = False,
    beside: Callable[[Path], object] | None = None,
) -> Path:
    """Write an adapter folder whole or not at all. state: see write_adapter_files.  beside: writes more into the folder.

    Raises CheckpointError.
    """
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    with new_folder(folder, num_bytes=num_bytes + 2**20, force=force) as aside:
        write_adapter_files(aside, state, settings)
        if beside is not None:
            beside(aside)
    return folder


def write_adapter_files(folder: Path, state: Mapping[str, Tensor], settings: AdapterSettings) -> None:
    """Write the files of an adapter into an existing folder: PEFT's two, and the fingerprint of its base.

    state: <module>.lora_A.weight, .lora_B.weight, and <parameter> of modules that were trained whole.
    PEFT's own key forms (base_model.model. in front, .default and .modules_to_save inside) are brought to these.
    """
    clean = {_clean(name): tensor for name, tensor in state.items()}
    targets = sorted({name.rpartition(".lora_")[0] for name in clean if ".lora_" in name})
    saved = tuple(f"{module}." for module in settings.modules_to_save)
    stray = [name for name in clean if ".lora_" not in name and not name.startswith(saved)]
    assert not stray, f"trained tensors outside modules_to_save: {some(stray)}"
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": settings.base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "bias": "none",
        "target_modules": targets,
        "modules_to_save": list(settings.modules_to_save) or None,
        "rank_pattern": dict(settings.rank_pattern),
        "alpha_pattern": dict(settings.alpha_pattern),
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "inference_mode": True,
    }
    write_file(folder / WEIGHTS, entries_of({f"{PREFIX}{name}": tensor for name, tensor in sorted(clean.items())}))
    if settings.quantised:  # in a file of its own: PEFT warns of keys that it does not know
        (folder / TAUGHT).write_text(json.dumps({"quantised": list(settings.quantised)}) + "\n", encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_fingerprint(folder, settings.fingerprint)


def _clean(name: str) -> str:
    name = name.removeprefix(PREFIX).replace(".modules_to_save.default.", ".")
    if f".{MAGNITUDE}" in name:
        return name.removesuffix(".weight").removesuffix(".default")  # as PEFT names it in a file
    return name.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.")
