"""A model folder becomes a model: by memory map, tensor by tensor, strict about names and shapes.

In: "tessella-nano", a folder in the official or the native layout, an adapter folder, or a name on a hub.
Out: Loaded: model, tokenizer, inputs, config.
Rules: every tensor of the file is used, listed as unused, or an error; every parameter is filled or an error.
A head that is tied (tie_word_embeddings) but stored all the same is passed over when it equals the embedding
table; when it differs, the weights are believed and the model is read as untied.
"""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from tessella.checkpoint.adapters import CONFIG, is_adapter, learned_in, read_adapter, read_adapter_config
from tessella.checkpoint.blank import blank_model
from tessella.checkpoint.builtin import NANO, nano_folder
from tessella.checkpoint.fingerprint import fingerprint, require_base
from tessella.checkpoint.hub import hub_folder, hub_name, name_in_address
from tessella.checkpoint.lowrank import combined, fit, merge_adapter
from tessella.checkpoint.names import (
    EMBEDDING,
    HEAD,
    Layout,
    as_in_files,
    group_of,
    groups_of,
    is_computed,
    native_layout,
    stored_shapes,
)
from tessella.checkpoint.published import HUB, PUBLISHED
from tessella.checkpoint.routing import last_routing, read_routing
from tessella.checkpoint.weights import Weights, open_weights, some
from tessella.config import LanguageConfig, ModelConfig, layout_name, model_config, read_config_json
from tessella.errors import CheckpointError, DownloadError, MemoryError_
from tessella.inputs import Inputs
from tessella.model.device import choose_device, choose_dtype
from tessella.model.routing import Routing
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
    """Load a model for inference, with the adapters that the name stands for, and one more if it is given, merged in memory.

    dtype: "auto" (bfloat16 where the device has it in hardware, else float32), "float32", "bfloat16" or "float16".
    Raises CheckpointError, ConfigError, DownloadError (first use of tessella-nano), MemoryError_.
    """
    where = choose_device(device)  # before the folder is looked for: a first use fetches 93 MB
    number_type = choose_dtype(dtype, where)
    folder, adapters = find_model(name_or_folder)
    if adapter is not None:
        adapters = (*adapters, adapter)
    model, unused = load_model(folder, device=where, dtype=number_type)
    if adapters:
        shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        layout = native_layout(model.config)
        read = [read_adapter(one) for one in adapters]
        fitted = [fit(one, shapes, model.config.language, layout) for one in read]
        require_base(read[0].folder, read[0].base, str(folder), *stored_parameters(folder))
        if any(one.has_dora for one in fitted):  # a magnitude is of the weights as the adapters below left them
            for one in fitted:
                merge_adapter(model, one)
        else:
            merge_adapter(model, reduce(combined, fitted))
    inputs = Inputs.load(folder, model.config, max_tiles=max_tiles, system=system)
    loaded = Loaded(model, inputs.tokenizer, inputs, model.config, folder, unused, inputs.stop_ids)
    beside = last_routing((folder, *adapters))
    if beside is not None:
        language = model.config.language
        use_routing(loaded, read_routing(beside, language.vocab_size, language.hidden_size).to(where))
    return loaded


def use_routing(loaded: Loaded, routing: Routing) -> None:
    """The model, its tokenizer and its inputs know the routing tokens from here on."""
    loaded.model.routing = routing
    loaded.tokenizer = loaded.tokenizer.with_routes(routing.routes)
    loaded.inputs = copy(loaded.inputs)  # an Inputs that somebody holds stays as it was
    loaded.inputs.tokenizer = loaded.tokenizer


def find_model(
    name_or_folder: str | Path, *, weights: bool = True, above: tuple[Path, ...] = ()
) -> tuple[Path, tuple[Path, ...]]:
    """What a person typed -> (model folder, the adapters on it, the lowest first). An adapter names its base; a run, its result.

    A name on a hub is fetched when it is not in the local cache; weights False: its config and tokenizer are enough.
    above: the adapters whose base this is.
    Raises CheckpointError when it is neither a folder nor a name, DownloadError when it cannot be fetched.
    """
    if str(name_or_folder) == NANO:
        return nano_folder(), ()
    folder = learned_in(Path(name_or_folder).expanduser())
    if not folder.is_dir():
        folder = _from_hub(str(name_or_folder), weights)
    if not is_adapter(folder):
        return folder, ()
    if folder.resolve() in above:
        raise CheckpointError(f"{folder} is, over its bases, its own base; its {CONFIG} must name the model it was taught on")
    base = str(read_adapter_config(folder).get("base_model_name_or_path") or "")
    if not base:
        raise CheckpointError(
            f"{folder} does not say which base it was taught on; give the base as the model and this as the adapter"
        )
    try:
        model, below = find_model(base, weights=weights, above=(*above, folder.resolve()))
    except (CheckpointError, DownloadError) as error:
        raise CheckpointError(f"the base of {folder} is not to be had: {error}; or name the base yourself") from error
    return model, (*below, folder)


def _from_hub(word: str, weights: bool) -> Path:
    name = hub_name(word)
    if name is not None:
        return hub_folder(name, weights=weights)
    if word in PUBLISHED:
        raise CheckpointError(f"{word} is a published model, and its weights are not here; say {HUB}/{word} to fetch them")
    address = name_in_address(word)
    if address is not None:
        raise CheckpointError(f"{word} is the address of a page; a model on a hub is named without it: say {address}")
    family = [known for known in PUBLISHED if known.startswith(word.partition("-")[0] + "-")]
    known = f"; published models of that family are {', '.join(family)}" if family else ""
    raise CheckpointError(
        f'there is no folder "{word}"; give a folder in the official or the native layout, a name on a hub '
        f"such as {HUB}/InternVL2-2B, or {NANO}{known}"
    )


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


def stored_parameters(folder: Path) -> tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]:
    """Shapes by our names, and what reads one parameter as it is stored, of a model folder."""
    raw = read_config_json(folder)
    config, layout = model_config(raw), layout_of(raw)
    weights = open_weights(folder)
    files = names_in(weights, layout)

    def tensor(name: str) -> Tensor:
        group = group_of(name, layout, config.language)
        return group.to_ours([weights[files[stored]] for stored in group.stored], config.language)[name]

    return {name: tuple(weight.shape) for name, weight in blank_model(config).named_parameters()}, tensor


def base_fingerprint(name: str) -> str:
    """The fingerprint of what a person named as a base; "" when it is an adapter itself."""
    folder, adapters = find_model(name)
    return "" if adapters else fingerprint(*stored_parameters(folder))


def layout_of(raw: Mapping[str, Any]) -> Layout:
    """Which layout a folder has, by its config.json. Raises ConfigError when it is none of ours."""
    name = layout_name(raw)
    return next(known for known in get_args(Layout) if known == name)


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
    names = {as_in_files(name, layout): name for name in weights.files}
    if len(names) < len(weights.files):
        twice = [name for name in weights.files if names[as_in_files(name, layout)] != name]
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
    unused = check_weights(weights, shapes, layout, language)
    files = names_in(weights, layout)
    for group in groups_of(shapes, layout, language):
        for name, tensor in group.to_ours([weights[files[stored]] for stored in group.stored], language).items():
            _place(model, name, tensor.to(device=device, dtype=dtype or tensor.dtype))
    return unused


def check_weights(
    weights: Weights, shapes: dict[str, tuple[int, ...]], layout: Layout, language: LanguageConfig
) -> tuple[str, ...]:
    """Compare a folder's tensors with our parameters' shapes; gives the names of unused tensors.

    Raises CheckpointError naming missing, left-over and misshapen tensors.
    """
    groups, files = groups_of(shapes, layout, language), names_in(weights, layout)
    wanted = {name: shape for group in groups for name, shape in stored_shapes(group, shapes, language).items()}
    extra = [name for name in files if name not in wanted]
    tied_head = group_of(HEAD, layout, language).stored[0] if HEAD not in shapes else None
    unused = [name for name in extra if is_computed(name) or name == tied_head]
    unknown = [name for name in extra if name not in unused]
    if any(".lora_" in name or ".base_layer." in name for name in unknown):
        raise CheckpointError(
            f"the weights hold an unmerged LoRA ({some([n for n in unknown if 'lora_' in n], 2)}); "
            "tessella convert FOLDER OUT merges it"
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
