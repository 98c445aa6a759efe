"""What a projector can be taught without the language model: folded features of drawn and photographed views, and their truth.

In: a model folder with a taught tower, --parts of collect.py, the tars.  Out: one safetensors file of Seen.
N pictures, K = 64 visual tokens of a picture, 4 patches in each, C = 1536 folded features.
"""

import json
import random
import time
from argparse import Namespace
from dataclasses import dataclass, fields
from pathlib import Path

import pictures
import torch
import views
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tessella.checkpoint.read import Loaded
from tessella.image import MEAN, STD
from tessella.model.connectors import pixel_shuffle

SIDE, BATCH, TOKENS = 224, 64, 64
SHARES = {"tiny": 0.27, "large": 0.10, "drawings": 0.27, "scenes": 0.18, "words": 0.18}


@dataclass(frozen=True)
class Seen:
    """Features (N, K, C) bfloat16 and what is shown; views.NONE where there is nothing, letters count from 1."""

    features: Tensor
    photo: Tensor  # (N,) index into Names.photos
    drawn: Tensor  # (N,) index into Names.drawings, of pictures that show one thing
    count: Tensor  # (N,) things in the scene, less one
    drawing: Tensor  # (N, K, 4)
    colour: Tensor  # (N, K, 4)
    shape: Tensor  # (N, K, 4)
    letter: Tensor  # (N, K, 4)


@dataclass(frozen=True)
class Names:
    photos: list[str]
    drawings: list[str]


def features(loaded: Loaded, seen: Tensor) -> Tensor:
    """seen (B, 3, S, S) in 0..1 -> folded features (B, K, C)."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return pixel_shuffle(loaded.model.vision_model(((seen - mean) / std).to(loaded.model.dtype))).to(torch.bfloat16)


def folded(labels: Tensor) -> Tensor:
    """What each patch shows (B, P, P) -> what the four patches of each visual token show (B, K, 4)."""
    return pixel_shuffle(labels[..., None]).short()


class Collector:
    """Shows the tower one view after another and keeps what it said beside the truth."""

    def __init__(self, loaded: Loaded):
        self.loaded = loaded
        self.found: dict[str, list[Tensor]] = {field.name: [] for field in fields(Seen)}
        self.clock = time.monotonic()

    def keep(self, view: Tensor, **truth: Tensor) -> None:
        blank = {"photo": (), "drawn": (), "count": ()} | dict.fromkeys(("drawing", "colour", "shape", "letter"), (TOKENS, 4))
        self.found["features"].append(features(self.loaded, view))
        for name, rest in blank.items():
            nothing = torch.full((len(view), *rest), views.NONE, dtype=torch.int16)
            self.found[name].append(truth.get(name, nothing).short())

    def tell(self, what: str) -> None:
        count = sum(len(part) for part in self.found["photo"])
        print(f"{what}: {count:,} pictures after {time.monotonic() - self.clock:.0f} s", flush=True)

    def seen(self) -> Seen:
        return Seen(**{name: torch.cat(parts) for name, parts in self.found.items()})


@torch.inference_mode()
def collect(loaded: Loaded, args: Namespace) -> tuple[Seen, Names]:
    """Every kind of view in its share of args.pictures."""
    data, parts, chance = Path(args.data), Path(args.parts), views.Chance(torch.device("cpu"), 1)
    wordnet = json.loads((data / "tiny-imagenet-classes.json").read_text())
    keys, emoji, classes = pictures.read_emoji(parts, args.styles.split(","))
    said = json.loads((parts / "names.json").read_text(encoding="utf-8"))
    grounds = pictures.read_tar(data / "howtocook.tar", 256, 2)[1]
    collector, photo_names = Collector(loaded), []
    batches = {kind: int(args.pictures * share) // BATCH for kind, share in SHARES.items()}
    for kind, tars, side in (
        ("tiny", ("tiny-imagenet-train-0.tar", "tiny-imagenet-train-1.tar"), 64),
        ("large", ("food101-ten.tar", "imagenet-one-each.tar"), 256),
    ):
        read = [pictures.read_tar(data / tar, side, 2) for tar in tars]
        files, pixels = [name for names, _ in read for name in names], torch.cat([p for _, p in read])
        labels = [photo_name(name, wordnet) for name in files]  # "" for a picture of many kinds
        photo_names += sorted({*labels} - {*photo_names, ""})
        named = [i for i, label in enumerate(labels) if label]
        order = random.Random(1).sample(named, min(len(named), batches[kind] * BATCH))
        for some in torch.tensor(order).split(BATCH):
            view = views.jitter(views.crop(pixels[some], views.crop_boxes(chance, len(some), 0.4), SIDE), chance, 0.2)
            collector.keep(view, photo=torch.tensor([photo_names.index(labels[i]) for i in some.tolist()]))
        collector.tell(kind)
    for _ in range(batches["drawings"]):
        view, drawn, at = views.drawings(emoji, classes, grounds, chance, BATCH, SIDE)
        collector.keep(view, drawn=drawn, drawing=folded(at))
    collector.tell("drawings")
    for _ in range(batches["scenes"]):
        scene = views.scenes(emoji, classes, grounds, chance, BATCH, SIDE)
        collector.keep(
            scene.views, count=scene.count, drawing=folded(scene.drawing), colour=folded(scene.colour), shape=folded(scene.shape)
        )
    collector.tell("scenes")
    words = pictures.render_words(parts, "train", batches["words"] * BATCH, 2, 1)
    for _ in range(batches["words"]):
        view, _, at = views.written((words.masks, words.columns, words.codes), grounds, chance, BATCH, SIDE)
        collector.keep(view, letter=folded(torch.where(at == 0, views.NONE, at)))
    collector.tell("words")
    return collector.seen(), Names(photo_names, [said[key]["en"] for key in keys])


def photo_name(file: str, wordnet: dict[str, str]) -> str:
    """ "n0123/n0123_1.webp" or "apple_pie/1.webp" or "n0123_rocking_chair.webp" -> the name that is taught."""
    folder, _, leaf = file.rpartition("/")
    if folder in wordnet:
        return wordnet[folder].split(",")[0].strip().lower()
    plain = folder.rsplit("/", 1)[-1] if folder else leaf.rsplit(".", 1)[0].partition("_")[2]
    return plain.replace("_", " ").lower()


def store(path: Path, seen: Seen, names: Names) -> None:
    tensors = {field.name: getattr(seen, field.name).contiguous() for field in fields(Seen)}
    save_file(tensors, path, {"names": json.dumps([names.photos, names.drawings], ensure_ascii=False)})


def restore(path: Path) -> tuple[Seen, Names]:
    with safe_open(path, "pt") as file:
        names = Names(*json.loads(file.metadata()["names"]))
        return Seen(**{field.name: file.get_tensor(field.name) for field in fields(Seen)}), names
