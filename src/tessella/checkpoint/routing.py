"""The routing/ folder beside a model or in an adapter: new rows, queries and decoders, in files of their own.

In: a Routing.  Out: routing.json (tokens, sizes), tokens.safetensors (rows and queries, float32), boxes.safetensors and
pictures.safetensors (float16: a decoder's weights are small, and half the bytes travel); and back.
The official files are not touched: whoever does not know the folder opens the model as ever. A decoder whose file is missing
is told when its token is chosen, and the text answer still comes.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tessella.checkpoint.weights import Weights, entries_of, some, write_file
from tessella.config import read_json
from tessella.errors import CheckpointError
from tessella.model.decoders.boxes import BoxConfig, BoxDecoder
from tessella.model.decoders.pictures import PictureConfig, PictureDecoder
from tessella.model.routing import Routing
from tessella.routes import KINDS, Kind, Routes, routes_for

FOLDER, CONFIG, TOKENS = "routing", "routing.json", "tokens.safetensors"
ROWS = ("tokens", "head", "queries")


def routing_in(folder: Path) -> Path | None:
    """The routing/ folder of a model folder or an adapter, if it has one."""
    return folder / FOLDER if (folder / FOLDER / CONFIG).is_file() else None


def last_routing(folders: Sequence[Path]) -> Path | None:
    """Of a model and the adapters on it, the lowest first: the routing/ folder that counts, which is the highest."""
    return next((found for folder in reversed(folders) if (found := routing_in(folder)) is not None), None)


def write_routing(parent: Path, routing: Routing, values: Mapping[str, Tensor] | None = None) -> Path:
    """Write routing/ into an existing folder. values: in place of the parameters' own, by their names in the Routing."""
    state = {name: parameter.detach() for name, parameter in routing.named_parameters()} | dict(values or {})
    folder = parent / FOLDER
    folder.mkdir()
    raw: dict[str, Any] = {
        "version": 1,
        "tokens": [route.name for route in routing.routes.each],
        "first_id": routing.routes.first_id,
        "width": routing.tokens.shape[1],
    }
    raw |= {kind: asdict(decoder.config) for kind, decoder in decoders_of(routing).items()}
    write_file(folder / TOKENS, entries_of({name: state[name].float() for name in ROWS}))
    for kind in decoders_of(routing):
        own = {name.removeprefix(f"{kind}."): value.half() for name, value in state.items() if name.startswith(f"{kind}.")}
        write_file(folder / f"{kind}.safetensors", entries_of(own))
    (folder / CONFIG).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    return folder


def decoders_of(routing: Routing) -> dict[Kind, BoxDecoder | PictureDecoder]:
    """The decoders that are there."""
    found: dict[Kind, BoxDecoder | PictureDecoder | None] = {"boxes": routing.boxes, "pictures": routing.pictures}
    return {kind: decoder for kind, decoder in found.items() if decoder is not None}


def read_routing(folder: Path, vocabulary: int, width: int) -> Routing:
    """Read a routing/ folder for a model of these rows and width.

    Raises CheckpointError when it is of another model, or its rows are missing or broken; a missing decoder is noted.
    """
    raw = read_json(folder / CONFIG)
    routes = _routes(raw, folder)
    if routes.first_id != vocabulary or raw.get("width") != width:
        raise CheckpointError(
            f"{folder} is of a model with {routes.first_id:,} rows of {raw.get('width')}, this one {vocabulary:,} of {width}; "
            "take the routing/ folder that was taught with this model"
        )
    routing = Routing(routes, width)
    if not (folder / TOKENS).is_file():
        raise CheckpointError(f"{folder} holds no {TOKENS}; copy the whole folder, or remove it to talk without routing")
    _fill(routing, folder / TOKENS, {name: tuple(getattr(routing, name).shape) for name in ROWS})
    if raw.get("boxes") is not None:
        routing.boxes = BoxDecoder(_config(BoxConfig, raw["boxes"], "layers_seen", folder))
    if raw.get("pictures") is not None:
        routing.pictures = PictureDecoder(_config(PictureConfig, raw["pictures"], "channels", folder))
    for kind, decoder in decoders_of(routing).items():
        path = folder / f"{kind}.safetensors"
        if path.is_file():
            _fill(decoder, path, {name: tuple(weight.shape) for name, weight in decoder.named_parameters()})
        else:
            routing.drop(kind, f"{path} is missing; copy it beside {CONFIG}")
    return routing.eval()


def copy_routing(source: Path | None, parent: Path) -> None:
    """Bring a routing/ folder along unchanged, where there is one."""
    if source is not None:
        shutil.copytree(source, parent / FOLDER)


@dataclass(frozen=True)
class RoutingProof:
    """Two routing/ folders, tensor by tensor, bit by bit."""

    tensors: int
    differing: tuple[str, ...]

    def __str__(self) -> str:
        return "; ".join(self.differing[:3]) if self.differing else f"{self.tensors} tensors, equal bit by bit"


def compare_routing(a: Path | None, b: Path | None) -> RoutingProof | None:
    """None where neither model has routing. Raises CheckpointError for a file that cannot be read."""
    if a is None and b is None:
        return None
    if a is None or b is None:
        return RoutingProof(0, (f"only {a or b} is there, the other model has no routing",))
    differing, tensors = [], 0
    if read_json(a / CONFIG) != read_json(b / CONFIG):
        differing.append(f"{CONFIG} differs")
    for name in sorted({file.name for folder in (a, b) for file in folder.glob("*.safetensors")}):
        files = [folder / name for folder in (a, b)]
        if not all(file.is_file() for file in files):
            differing.append(f"{name} is on one side alone")
            continue
        left, right = (Weights([file]) for file in files)
        for key in sorted(left.files.keys() | right.files.keys()):
            tensors += 1
            same = key in left.files and key in right.files and left[key].dtype == right[key].dtype
            if not (same and torch.equal(left[key], right[key])):
                differing.append(f"{key} of {name} differs")
    return RoutingProof(tensors, tuple(differing))


def _routes(raw: Mapping[str, Any], folder: Path) -> Routes:
    if raw.get("version") != 1 or raw.get("tokens") != list(KINDS) or not isinstance(raw.get("first_id"), int):
        raise CheckpointError(f"{folder / CONFIG} is not of version 1 with the tokens {', '.join(KINDS)}; write it again")
    return routes_for(raw["first_id"])


Config = TypeVar("Config", BoxConfig, PictureConfig)


def _config(kind: type[Config], raw: Mapping[str, Any], row: str, folder: Path) -> Config:
    """row: the field that JSON keeps as a list."""
    try:
        return kind(**{**raw, row: tuple(raw[row])})
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{folder / CONFIG}: {kind.__name__} is described otherwise ({error}); write it again") from error


@torch.no_grad()
def _fill(module: nn.Module, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError for missing, left-over and misshapen tensors."""
    weights = Weights([path])
    wrong = list(shapes.keys() ^ weights.files.keys())
    wrong += [name for name in shapes.keys() & weights.files.keys() if weights.shapes[name] != shapes[name]]
    if wrong:
        raise CheckpointError(f"{path} does not fit {CONFIG}: {some(sorted(wrong))}; copy both from one place")
    parameters = dict(module.named_parameters())
    for name in shapes:
        parameters[name].copy_(weights[name])
