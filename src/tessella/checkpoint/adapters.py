"""Adapters in PEFT's file format: read, write, and merge in float32. No PEFT is imported.

In: a folder with adapter_config.json and adapter_model.safetensors.  Out: low-rank pairs by module, whole tensors by name.
Keys: base_model.model.<our module>.lora_A.weight and .lora_B.weight; fully trained modules (modules_to_save) as
base_model.model.<our parameter>. An InternLM2 adapter may also use the official names: its wqkv pair is split by rows.
r rank, I inputs, O outputs of a linear layer: A (r, I), B (O, r), merged W + scale * B A.
Source: arXiv:2106.09685; huggingface/peft, save_and_load.py.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tessella.checkpoint.folder import new_folder
from tessella.checkpoint.names import our_names, split_rows
from tessella.checkpoint.weights import Weights, entries_of, some, write_file
from tessella.config import LanguageConfig
from tessella.errors import CheckpointError

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# Kinds of LoRA that change the arithmetic and that we do not have: refused, never passed over.
REFUSED = (
    *("use_dora", "fan_in_fan_out", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices"),
    *("use_qalora", "alora_invocation_tokens", "arrow_config", "corda_config"),
)


@dataclass(frozen=True)
class Pair:
    """One low-rank change: scale * b @ a."""

    a: Tensor  # (r, I)
    b: Tensor  # (O, r)
    scale: float

    def delta(self) -> Tensor:
        """The change of the weight (O, I) in float32."""
        return (self.b.float() @ self.a.float()) * self.scale


@dataclass(frozen=True)
class Adapter:
    folder: Path
    base: str  # what the adapter was taught on: a folder, a hub name, or "tessella-nano"
    pairs: dict[str, Pair]  # by our module name, as "language_model.model.layers.0.self_attn.q_proj"
    whole: dict[str, Tensor]  # by our parameter name, as "mlp1.1.weight"

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """The parameter of that name with the adapter merged: arithmetic in float32, result in the weight's own type."""
        if name in self.whole:
            return self.whole[name].to(device=weight.device, dtype=weight.dtype)
        pair = self.pairs.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if pair is None:
            return weight
        return (weight.float() + pair.delta().to(weight.device)).to(weight.dtype)

    def changes_nothing(self) -> bool:
        """Whether every pair's product is zero and there is no whole tensor: untrained, or saved wrongly."""
        return not self.whole and not any(bool(pair.b.any()) and bool(pair.a.any()) for pair in self.pairs.values())


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
    sides: dict[str, dict[str, Tensor]] = {"lora_A": {}, "lora_B": {}}
    whole: dict[str, Tensor] = {}
    for key in weights.files:
        name = key.removeprefix(PREFIX)
        module, _, side = name.removesuffix(".weight").removesuffix(".default").rpartition(".")
        if side in sides:
            sides[side][module] = weights[key]
        elif "lora_" in name:
            raise CheckpointError(
                f"{folder / WEIGHTS}: {key} is a kind of LoRA tensor that we do not know; teach linear layers only"
            )
        else:
            whole[name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")] = weights[key]
    alone = sides["lora_A"].keys() ^ sides["lora_B"].keys()
    if alone:
        raise CheckpointError(f"{folder / WEIGHTS}: lora_A and lora_B do not both stand for {some(sorted(alone))}")
    pairs = {module: Pair(a, sides["lora_B"][module], _scale(raw, module, a, folder)) for module, a in sides["lora_A"].items()}
    if not pairs and not whole:
        raise CheckpointError(f"{folder / WEIGHTS} holds no tensors; teach the adapter again")
    return Adapter(folder, str(raw.get("base_model_name_or_path") or ""), pairs, whole)


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


def fit(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], language: LanguageConfig) -> Adapter:
    """The adapter in our names, every tensor matched with a parameter of the base (shapes by our names).

    Raises CheckpointError naming what has no place in the base or another shape: an adapter of another model.
    """
    pairs: dict[str, Pair] = {}
    for module, pair in adapter.pairs.items():
        names = our_names(module, language)
        rows = split_rows(pair.b, language) if len(names) == 3 else (pair.b,)
        pairs |= {name: replace(pair, b=part) for name, part in zip(names, rows, strict=True)}
    whole: dict[str, Tensor] = {}
    for parameter, tensor in adapter.whole.items():
        names = our_names(parameter, language)
        rows = split_rows(tensor, language) if len(names) == 3 else (tensor,)
        whole |= dict(zip(names, rows, strict=True))
    wanted: dict[str, tuple[int, ...]] = {f"{name}.weight": (pair.b.shape[0], pair.a.shape[1]) for name, pair in pairs.items()}
    wanted |= {name: tuple(tensor.shape) for name, tensor in whole.items()}
    lost = [name for name in wanted if name not in shapes]
    if lost:
        raise CheckpointError(
            f"{len(lost)} of {len(wanted)} tensors of {adapter.folder} have no place in the base: {some(lost)}; "
            f'it was taught on "{adapter.base}": give that base'
        )
    wrong = [
        f"{name} {shape} in the adapter, {shapes[name]} in the base" for name, shape in wanted.items() if shape != shapes[name]
    ]
    if wrong:
        raise CheckpointError(f'wrong shapes: {some(wrong, 3)}; the adapter was taught on "{adapter.base}": give that base')
    return replace(adapter, pairs=pairs, whole=whole)


def merge_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Merge a fitted adapter into the model in memory. Float32 arithmetic, each weight keeps its type."""
    for name, weight in list(model.named_parameters()):
        merged = adapter.merged(name, weight.detach())
        if merged.data_ptr() != weight.data_ptr():
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, nn.Parameter(merged, requires_grad=weight.requires_grad))


@dataclass(frozen=True)
class AdapterSettings:
    """What adapter_config.json must say so that PEFT, too, reads the adapter back as it was taught."""

    base: str
    rank: int
    alpha: float
    dropout: float = 0.0
    modules_to_save: tuple[str, ...] = ()  # modules that were trained whole, as "mlp1"


def save_adapter(folder: Path, state: Mapping[str, Tensor], settings: AdapterSettings, *, force: bool = False) -> Path:
    """Write an adapter folder whole or not at all. state: see write_adapter_files. Raises CheckpointError."""
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    with new_folder(folder, num_bytes=num_bytes + 2**20, force=force) as aside:
        write_adapter_files(aside, state, settings)
    return folder


def write_adapter_files(folder: Path, state: Mapping[str, Tensor], settings: AdapterSettings) -> None:
    """Write the two files of an adapter into an existing folder.

    state: <our module>.lora_A.weight, .lora_B.weight, and <our parameter> of modules that were trained whole.
    PEFT's own key forms (base_model.model. in front, .default and .modules_to_save inside) are brought to these.
    """
    clean = {_clean(name): tensor for name, tensor in state.items()}
    targets = sorted({name.rpartition(".lora_")[0] for name in clean if ".lora_" in name})
    stray = [n for n in clean if ".lora_" not in n and not n.startswith(tuple(f"{m}." for m in settings.modules_to_save))]
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
        "inference_mode": True,
    }
    write_file(folder / WEIGHTS, entries_of({f"{PREFIX}{name}": tensor for name, tensor in sorted(clean.items())}))
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _clean(name: str) -> str:
    name = name.removeprefix(PREFIX).replace(".modules_to_save.default.", ".")
    return name.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.")


class OnTheFly(nn.Module):
    """A linear layer with its pair beside it, unmerged: y = W x + scale * B (A x). The oracle of a merge."""

    def __init__(self, base: nn.Linear, pair: Pair):
        super().__init__()
        self.base, self.scale = base, pair.scale
        self.a, self.b = (x.to(base.weight.device, torch.float32) for x in (pair.a, pair.b))

    def forward(self, x: Tensor) -> Tensor:
        low = nn.functional.linear(nn.functional.linear(x.float(), self.a), self.b)
        return (self.base(x).float() + self.scale * low).to(x.dtype)


def attach(model: nn.Module, adapter: Adapter) -> None:
    """Hang a fitted adapter beside the model's linear layers without merging; whole tensors are put in place."""
    merge_adapter(model, replace(adapter, pairs={}))
    for name, pair in adapter.pairs.items():
        parent, _, leaf = name.rpartition(".")
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise CheckpointError(f"{name} is a {type(layer).__name__}; low-rank pairs sit on linear layers only")
        setattr(model.get_submodule(parent), leaf, OnTheFly(layer, pair))
