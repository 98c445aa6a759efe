"""A model folder becomes a model: by memory map, tensor by tensor, strict about names and shapes.

In: "tessella-nano", a folder in the official or the native layout, an adapter folder, or a hub name that is on this disk.
Out: Loaded: model, tokenizer, inputs, config.
Rules: every tensor of the file is used, listed as unused, or an error; every parameter is filled or an error.
A head that is tied (tie_word_embeddings) but stored all the same is passed over when it equals the embedding
table; when it differs, the weights are believed and the model is read as untied.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tessella.checkpoint.adapters import fit, is_adapter, merge_adapter, read_adapter, read_adapter_config
from tessella.checkpoint.blank import blank_model
from tessella.checkpoint.builtin import NANO, nano_folder
from tessella.checkpoint.names import EMBEDDING, HEAD, Group, Layout, as_in_files, group_of, groups_of, is_computed, stored_shapes
from tessella.checkpoint.weights import Weights, open_weights, some
from tessella.config import LanguageConfig, ModelConfig, is_native, model_config, read_config_json
from tessella.errors import CheckpointError, MemoryError_
from tessella.inputs import Inputs
from tessella.model.device import choose_device, choose_dtype
from tessella.model.vision_language import VisionLanguageModel
from tessella.tokenizer import Tokenizer


@dataclass
class Loaded:
    """All that is needed to ask, teach or score a model."""

    model: VisionLanguageModel
    tokenizer: Tokenizer
    inputs: Inputs
    config: ModelConfig
    folder: Path
    unused: tuple[str, ...]  # tensors of the files that the model has no use for
    stop_ids: tuple[int, ...]


def load(
    name_or_folder: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    adapter: Path | None = None,
    max_tiles: int | None = None,
    system: str | None = None,
) -> Loaded:
    """Load a model for inference, an adapter merged in memory if one is given.

    dtype: "auto" (bfloat16 where the device has it in hardware, else float32), "float32", "bfloat16" or "float16".
    Raises CheckpointError, ConfigError, DownloadError (first use of tessella-nano), MemoryError_.
    """
    where = choose_device(device)  # before the folder is looked for: a first use fetches 93 MB
    number_type = choose_dtype(dtype, where)
    folder, adapter = find_model(name_or_folder, adapter)
    model, unused = load_model(folder, device=where, dtype=number_type)
    if adapter is not None:
        shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        merge_adapter(model, fit(read_adapter(adapter), shapes, model.config.language))
    tokenizer = Tokenizer.load(folder)
    inputs = Inputs(model.config, tokenizer, max_tiles=max_tiles, system=system)
    return Loaded(model, tokenizer, inputs, model.config, folder, unused, inputs.stop_ids)


def find_model(name_or_folder: str | Path, adapter: Path | None = None) -> tuple[Path, Path | None]:
    """What a person typed -> (model folder, adapter folder or None). An adapter folder names its own base.

    Raises CheckpointError when it is no folder and not on this disk.
    """
    if str(name_or_folder) == NANO:
        return nano_folder(), adapter
    folder = Path(name_or_folder).expanduser()
    if not folder.is_dir():
        return _hub_snapshot(str(name_or_folder)), adapter
    if not is_adapter(folder):
        return folder, adapter
    if adapter is not None:
        raise CheckpointError(f"{folder} is an adapter itself; give its base as the model, and one adapter")
    base = str(read_adapter_config(folder).get("base_model_name_or_path") or "")
    if not base:
        raise CheckpointError(
            f"{folder} does not say which base it was taught on; give the base as the model and this as the adapter"
        )
    if base != NANO and is_adapter(Path(base).expanduser()):
        raise CheckpointError(f"the base of {folder} is itself an adapter ({base}); convert that one first")
    try:
        return find_model(base)[0], folder
    except CheckpointError as error:
        raise CheckpointError(f"the base of {folder} is not to be had: {error}; or name the base yourself") from error


def _hub_snapshot(name: str) -> Path:
    """The newest snapshot of a hub name in the local cache. No network: it only looks. Raises CheckpointError."""
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", "~/.cache/huggingface")) / "hub").expanduser()
    if name.count("/") == 1 and ".." not in name and not name.startswith((".", "/", "~")):
        repository = hub / f"models--{name.replace('/', '--')}"
        reference = repository / "refs" / "main"
        if reference.is_file():
            snapshot = repository / "snapshots" / reference.read_text(encoding="utf-8").strip()
            if snapshot.is_dir():
                return snapshot
        raise CheckpointError(
            f'there is no folder "{name}" here, and no such model in {hub}; if it is a hub name, fetch it first: '
            f"huggingface-cli download {name} --local-dir {name.split('/')[1]}, and give that folder; or say {NANO}"
        )
    raise CheckpointError(f'there is no folder "{name}"; give a folder in the official InternVL2 layout, or {NANO}')


def load_model(
    folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[VisionLanguageModel, tuple[str, ...]]:
    """Read config.json and the weights of a folder -> (model in eval mode, names of unused tensors).

    dtype None keeps each tensor's own type. On the CPU a tensor whose type is kept stays a view of the mapped file;
    writing to it changes our memory, never the file.
    """
    raw = read_config_json(folder)
    config, layout = model_config(raw), layout_of(raw)
    weights = open_weights(folder)
    config = resolve_head(config, weights, layout)
    model = blank_model(config)
    try:
        unused = load_weights(model, weights, layout=layout, device=device, dtype=dtype)
    except torch.OutOfMemoryError as error:
        need = weights.num_bytes() / 2**30
        raise MemoryError_(f"the weights of {folder} are {need:.1f} GiB and do not fit on {device}; take --device cpu") from error
    return model.eval(), unused


def layout_of(raw: Mapping[str, Any]) -> Layout:
    """Which layout a folder has, by its config.json. Raises ConfigError when it is neither."""
    return "native" if is_native(raw) else "official"


def resolve_head(config: ModelConfig, weights: Weights, layout: Layout = "official") -> ModelConfig:
    """Tied or untied, by the config and, where a head is stored all the same, by the weights."""
    language = config.language
    files = names_in(weights, layout)
    head, table = (files.get(group_of(name, layout, language).stored[0]) for name in (HEAD, EMBEDDING))
    if not language.tie_embeddings or head is None or table is None:
        return config
    if weights.shapes[head] == weights.shapes[table] and torch.equal(weights[head], weights[table]):
        return config
    return replace(config, language=replace(language, tie_embeddings=False))


def names_in(weights: Weights, layout: Layout) -> dict[str, str]:
    """Names as transformers or InternVL write them into files -> names as they stand in these files.

    They differ only where a native folder was written with the names in memory. Raises CheckpointError for both at once.
    """
    names = {as_in_files(name) if layout == "native" else name: name for name in weights.files}
    if len(names) < len(weights.files):
        twice = [name for name in weights.files if names[as_in_files(name)] != name]
        raise CheckpointError(f"{some(twice)} stand in the weights under two names; fetch or write the folder again")
    return names


def load_weights(
    model: VisionLanguageModel,
    weights: Weights,
    *,
    layout: Layout = "official",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[str, ...]:
    """Fill a model (on the meta device or any other) from a folder's tensors; gives the names of unused tensors.

    Raises CheckpointError naming missing, left-over and misshapen tensors before the first one is read.
    """
    language = model.config.language
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    groups, files = groups_of(shapes, layout, language), names_in(weights, layout)
    unused = _check(weights, files, shapes, groups, layout, language)
    for group in groups:
        for name, tensor in group.to_ours([weights[files[stored]] for stored in group.stored], language).items():
            _place(model, name, tensor.to(device=device, dtype=dtype or tensor.dtype))
    return unused


def _check(
    weights: Weights,
    files: dict[str, str],
    shapes: dict[str, tuple[int, ...]],
    groups: list[Group],
    layout: Layout,
    language: LanguageConfig,
) -> tuple[str, ...]:
    wanted = {name: shape for group in groups for name, shape in stored_shapes(group, shapes, language).items()}
    extra = [name for name in files if name not in wanted]
    tied_head = group_of(HEAD, layout, language).stored[0] if HEAD not in shapes else None
    unused = [name for name in extra if is_computed(name) or name == tied_head]
    unknown = [name for name in extra if name not in unused]
    if any(".lora_" in name or ".base_layer." in name for name in unknown):
        raise CheckpointError(
            f"the weights hold an unmerged LoRA ({some([n for n in unknown if 'lora_' in n], 2)}); "
            "merge it with the tool that wrote it, or give its base and its adapter"
        )
    missing = [name for name in wanted if name not in files]
    if missing or unknown:
        parts = [f"{len(missing)} are missing: {some(missing)}"] if missing else []
        parts += [f"{len(unknown)} are not known: {some(unknown)}"] if unknown else []
        raise CheckpointError(
            f"config.json asks for {len(wanted)} tensors of the {layout} layout; {'; '.join(parts)}; "
            "config.json and weights must be of the same model and layout: fetch the folder again"
        )
    wrong = []
    for name, need in wanted.items():
        if weights.shapes[files[name]] != need:
            wrong.append(f"{name} is {weights.shapes[files[name]]}, must be {need}")
    if wrong:
        raise CheckpointError(f"{len(wrong)} tensors have another shape than config.json says: {some(wrong, 3)}")
    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    types = {name: weights.dtypes[files[name]] for name in wanted}
    whole = [f"{name} ({dtype})" for name, dtype in types.items() if dtype not in floats]
    if whole:
        raise CheckpointError(f"quantised weights are not read: {some(whole, 3)}; give the folder in bfloat16 or float32")
    return tuple(files[name] for name in unused)


def _place(model: nn.Module, name: str, tensor: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, nn.Parameter(tensor))
