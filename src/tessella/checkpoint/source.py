"""Whatever lies on the disk as a model, seen as our parameters, one at a time.

In: a model folder (official or native), an adapter with its base, an official LoRA training checkpoint, or XTuner's .pth with
its base; adapters may lie on adapters.  Out: a Source: config, names, shapes, and each tensor when it is asked for.
Tensors are read, not mapped (weights.py), so a model of any size passes through a process that stays small.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tessella.checkpoint.adapters import is_adapter, learned_in, pairs_and_whole, read_adapter, read_adapter_config
from tessella.checkpoint.blank import blank_model
from tessella.checkpoint.builtin import NANO
from tessella.checkpoint.fingerprint import require_base
from tessella.checkpoint.lowrank import CHUNK_NUMBERS, Adapter, attach, combined, fit
from tessella.checkpoint.lowrank import layout_of as layout_of_names
from tessella.checkpoint.names import Layout, group_of, native_layout
from tessella.checkpoint.read import check_weights, find_model, layout_of, names_in, resolve_head
from tessella.checkpoint.routing import last_routing, routing_in
from tessella.checkpoint.streams import Strips
from tessella.checkpoint.weights import INDEX, SINGLE, Entry, Weights, open_weights, some
from tessella.checkpoint.xtuner import LoraScale, is_xtuner, lora_scales, read_xtuner
from tessella.config import ModelConfig, is_native, load_config, read_config_json
from tessella.errors import CheckpointError
from tessella.model.vision_language import VisionLanguageModel

Kind = Literal["official", "native", "adapter", "lora", "xtuner"]
KINDS: dict[Kind, str] = {
    "official": "a model in the official layout",
    "native": "a model in the native layout of transformers",
    "adapter": "an adapter in PEFT's format",
    "lora": "a LoRA training checkpoint of the official code",
    "xtuner": "a checkpoint of XTuner",
}
REMEMBERED_BYTES = 2**28  # a larger tensor is read again rather than kept
ALPHA_PER_RANK = 2.0  # the official training code wraps with lora_alpha = 2 r, and stores r alone


@dataclass(frozen=True)
class Origin:
    """What a person said about IN beside its place."""

    base: str | None = None  # of an adapter or a .pth
    xtuner_config: Path | None = None
    lora_alpha: float | None = None
    tower_lora_alpha: float | None = None

    def scales(self) -> dict[str, LoraScale]:
        """The scales of a .pth, flags before the config's text. Raises CheckpointError."""
        found: dict[str, LoraScale] = {}
        if self.xtuner_config is not None:
            try:
                text = self.xtuner_config.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(
                    f"{self.xtuner_config} cannot be read as text ({error}); give XTuner's config file"
                ) from error
            found |= lora_scales(text, str(self.xtuner_config))
        told = {"language": self.lora_alpha, "tower": self.tower_lora_alpha}
        return found | {part: LoraScale(alpha) for part, alpha in told.items() if alpha is not None}


class ExactRows(NamedTuple):
    """Rows begin to end of a merged parameter in float64: the oracle of the merge, which runs in float32."""

    begin: int
    end: int
    merged: Tensor
    change: Tensor  # what the adapter adds
    error: Tensor  # what float32 sums may be off by, a bound for each number; one 0 for all where nothing is summed


class _ReadLast(threading.local):
    """What a thread read last: one may write what another compares."""

    def __init__(self) -> None:
        self.parts: dict[str, Tensor] = {}


@dataclass(frozen=True)
class Source:
    """A model on the disk. Names and shapes are those of our parameters."""

    path: Path
    kind: Kind
    folder: Path  # whose config.json, tokenizer and side files are the model's
    layout: Layout  # of that folder
    config: ModelConfig
    weights: Weights  # under the layout's names as they stand in files
    adapter: Adapter | None  # under our names; several on one another are one here
    places: tuple[Path, ...]  # everything that is read from, which must not be written to
    base: str  # what an adapter of this source is taught on, as a person would name it
    shapes: dict[str, tuple[int, ...]]
    # not init: what is made from it with replace() begins with its own
    _last: _ReadLast = field(init=False, default_factory=_ReadLast, repr=False)

    @property
    def routing(self) -> Path | None:
        """The routing/ folder that counts: of the model, or of the highest adapter that has one."""
        return last_routing([place for place in self.places if place.is_dir()])

    def touches(self, name: str) -> bool:
        """Whether the adapter changes that parameter."""
        return self.adapter is not None and self.adapter.touches(name)

    def dtype(self, name: str) -> torch.dtype:
        """The type in which the parameter is stored."""
        return self.weights.dtypes[group_of(name, self.layout, self.config.language).stored[0]]

    def untaught(self, name: str) -> Tensor:
        """The parameter without the adapter, as stored."""
        if name not in self._last.parts:
            group = group_of(name, self.layout, self.config.language)
            self._last.parts = {}
            parts = group.to_ours([self.weights.read(stored) for stored in group.stored], self.config.language)
            if sum(part.numel() * part.itemsize for part in parts.values()) > REMEMBERED_BYTES:
                return parts[name]
            self._last.parts = parts  # what is stored together here is asked for part after part, and the other way round
        return self._last.parts[name]

    def strips(self, name: str) -> Strips | None:
        """Where exactly this parameter's bytes lie; None when the adapter changes it, or its parts are of several types."""
        group = group_of(name, self.layout, self.config.language)
        if self.touches(name) or len({self.weights.dtypes[stored] for stored in group.stored}) > 1:
            return None
        return group.to_ours([self.weights.strips(stored) for stored in group.stored], self.config.language)[name]

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The parameter with the adapter merged, in dtype or as stored. It is rounded once, however it is stored."""
        weight = self.untaught(name)
        if self.adapter is not None:
            return self.adapter.merged(name, weight, dtype)
        return weight if dtype is None else weight.to(dtype)

    def exact(self, name: str, weight: Tensor) -> Iterator[ExactRows]:
        """What the merge of a touched parameter must give, in pieces. weight: the parameter untaught."""
        assert self.adapter is not None
        whole = self.adapter.whole.get(name)
        rows = max(1, CHUNK_NUMBERS // max(1, weight[0].numel()))
        for begin in range(0, weight.shape[0], rows):
            end = min(begin + rows, weight.shape[0])
            was = weight[begin:end].double()
            if whole is not None:
                merged = whole[begin:end].double()
                error = torch.zeros(())
            else:
                pair = self.adapter.pairs[name.removesuffix(".weight")]
                merged, error = pair.exact_rows(weight[begin:end], begin, end)
            yield ExactRows(begin, end, merged, merged - was, error)

    def entries(self, dtype: torch.dtype | None = None) -> list[Entry]:
        """Every parameter, made when its turn to be written has come; dtype None keeps each one's own."""
        entries = []
        for name, shape in self.shapes.items():
            stored = self.dtype(name)
            strips = self.strips(name) if dtype in (None, stored) else None
            entries.append(Entry(name, shape, dtype or stored, partial(self.tensor, name, dtype), strips))
        return entries

    def num_bytes(self) -> int:
        """Bytes of the weights as stored."""
        return self.weights.num_bytes()

    def model(self, device: torch.device, *, taught: bool = True) -> VisionLanguageModel:
        """The model in float32, the adapter hanging beside its layers unmerged (taught) or left away."""
        model = self._filled(device, self.untaught)
        if taught and self.adapter is not None:
            attach(model, self.adapter)
        return model

    def shaken_model(self, device: torch.device, types: Mapping[str, torch.dtype]) -> VisionLanguageModel:
        """The model in float32, merged, each parameter of types shaken as rounding to that type shakes it.

        It says by how much rounding alone changes the answers; always the same way.
        """
        chance = torch.Generator().manual_seed(0)

        def make(name: str) -> Tensor:
            weight = self.tensor(name, torch.float32)
            return shaken(weight, types[name], chance) if name in types else weight

        return self._filled(device, make)

    def _filled(self, device: torch.device, make: Callable[[str], Tensor]) -> VisionLanguageModel:
        model = blank_model(self.config)
        for name in self.shapes:
            module, _, leaf = name.rpartition(".")
            tensor = make(name).to(device=device, dtype=torch.float32)
            setattr(model.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))
        return model.eval()


def shaken(weight: Tensor, dtype: torch.dtype, chance: torch.Generator) -> Tensor:
    """float32 numbers moved by up to half of a unit in the last place that they would have in dtype."""
    kind = torch.finfo(dtype)
    units = (torch.exp2(torch.frexp(weight).exponent.float() - 1) * kind.eps).clamp_min(kind.tiny * kind.eps)
    return weight + (torch.rand(weight.shape, generator=chance) - 0.5) * units


def kind_of(path: Path) -> Kind:
    """What lies there. Raises CheckpointError: not there, not known, or two things at once."""
    if is_xtuner(path):
        return "xtuner"
    if not path.is_dir():
        what = "is no folder, nor a .pth" if path.exists() else "is not there"
        raise CheckpointError(f"{path} {what}; known are {_known()}")
    has_model = (path / "config.json").is_file() and any((path / name).is_file() for name in (SINGLE, INDEX))
    if is_adapter(path):
        if has_model:
            raise CheckpointError(f"{path} holds both an adapter and a model; take them apart and give one of them")
        return "adapter"
    if not (path / "config.json").is_file():
        here = ", ".join(sorted(one.name for one in path.iterdir())[:5]) or "nothing"
        raise CheckpointError(f"{path} holds neither config.json nor adapter_config.json, but {here}; known are {_known()}")
    if is_native(read_config_json(path)):
        return "native"
    names = open_weights(path).files
    return "lora" if any(".lora_A." in name or ".lora_B." in name for name in names) else "official"


def _known() -> str:
    return "; ".join(KINDS.values())


def open_source(name: str | Path, origin: Origin | None = None) -> Source:
    """Open what a person named: a place on the disk, "tessella-nano", or a hub name. Raises CheckpointError, ConfigError."""
    return _open(str(name), origin or Origin(), ())


def _open(name: str, origin: Origin, above: tuple[Path, ...]) -> Source:
    path = Path(name).expanduser()
    if name == NANO or not path.exists():
        path = find_model(name)[0]
    path = learned_in(path)
    if path.resolve() in above:
        raise CheckpointError(f"{path} is, over its bases, its own base; name the base with --base")
    kind = kind_of(path)
    if kind == "adapter":
        return _open_adapter(path, origin, above)
    if kind == "xtuner":
        if origin.base is None:
            raise CheckpointError(f"{path} holds only what was taught; name the model that it was taught on with --base")
        return _with(_open(origin.base, Origin(), (*above, path.resolve())), read_xtuner(path, origin.scales()), path, kind)
    if origin.base is not None and kind != "lora":
        raise CheckpointError(f"{path} is {KINDS[kind]} and needs no base; leave --base {origin.base} away")
    if kind == "lora":
        return _open_training(path, origin)
    return _open_model(path, kind, name)


def _open_adapter(path: Path, origin: Origin, above: tuple[Path, ...]) -> Source:
    base = origin.base or str(read_adapter_config(path).get("base_model_name_or_path") or "")
    if not base:
        raise CheckpointError(f"{path} does not say which base it was taught on; name it with --base")
    found = read_adapter(path)
    try:
        below = _open(base, Origin(), (*above, path.resolve()))
    except CheckpointError as error:
        raise CheckpointError(f"the base of {path} is not to be had: {error}; or name the base yourself (--base)") from error
    fitted = _with(below, found, path, "adapter")
    if below.adapter is None:
        require_base(path, found.base, str(below.path), below.shapes, below.untaught)
    return fitted


def _with(below: Source, adapter: Adapter, path: Path, kind: Kind) -> Source:
    """The source with one more adapter on it."""
    fitted = fit(adapter, below.shapes, below.config.language, native_layout(below.config))
    fitted = replace(fitted, base=fitted.base or below.base)
    if fitted.changes_nothing() and (kind != "adapter" or routing_in(path) is None):
        raise CheckpointError(
            f"{path} changes nothing: all {len(fitted.pairs)} of its low-rank products are zero, as before the first step; "
            "teach it first"
        )
    whole = fitted if below.adapter is None else combined(below.adapter, fitted)
    return replace(below, path=path, kind=kind, adapter=whole, places=(*below.places, path))


def _open_model(path: Path, kind: Kind, name: str) -> Source:
    weights = open_weights(path)
    layout = layout_of(read_config_json(path))
    found = layout_of_names(weights.files, path)
    wanted = "native" if layout in ("native", "llava", "llava_next") else "official"  # BLIP-2 names its tower as InternVL does
    if found != wanted:
        raise CheckpointError(
            f"{path} mixes two layouts: its config.json is {layout}, its tensors are {found}; take both from the same model"
        )
    base = name if name == NANO or not Path(name).expanduser().exists() else str(path.resolve())
    return _source(path, kind, layout, weights, base)


def _source(path: Path, kind: Kind, layout: Layout, weights: Weights, base: str) -> Source:
    config = resolve_head(load_config(path), weights, layout)
    shapes = {name: tuple(weight.shape) for name, weight in blank_model(config).named_parameters()}
    check_weights(weights, shapes, layout, config.language)
    weights = weights.select(names_in(weights, layout))
    return Source(path, kind, path, layout, config, weights, None, (path,), base, shapes)


def _open_training(path: Path, origin: Origin) -> Source:
    """The official code's LoRA training checkpoint: PEFT's names inside a whole model."""
    raw = read_config_json(path)
    stored = open_weights(path)
    plain = {name.replace(".base_model.model.", ".", 1).replace(".base_layer.", "."): name for name in stored.files}
    taught = {name: old for name, old in plain.items() if ".lora_" in name}
    weights = stored.select({name: old for name, old in plain.items() if name not in taught})
    below = _source(path, "lora", "official", weights, origin.base or str(path.resolve()))

    def scale(module: str, a: Tensor) -> float:
        key = "use_backbone_lora" if module.startswith("vision_model.") else "use_llm_lora"
        if int(raw.get(key) or 0) != a.shape[0]:
            raise CheckpointError(
                f"{path}: {module} holds a LoRA of rank {a.shape[0]}, but config.json says {key} {raw.get(key)}; "
                "config.json and weights must be of the same run"
            )
        return ALPHA_PER_RANK

    pairs, whole = pairs_and_whole({name: stored[old] for name, old in taught.items()}, scale, path)
    assert not whole, f"tensors that are no pairs among {some(list(whole))}"
    return _with(below, Adapter(path, below.base, pairs, {}), path, "lora")


def file_state(source: Source) -> list[Any]:
    """What tells that the files a source is read from are the same as before: name, size and time of change of each."""
    files: list[Path] = []
    for place in source.places:
        files += [place] if place.is_file() else sorted(one for one in place.rglob("*") if one.is_file())
    return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
