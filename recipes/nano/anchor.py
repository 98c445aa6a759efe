"""Between stages 1 and 2, where no GPU is at hand: the projector learns the language model's own words for what a patch shows.

Each visual token is pulled towards the embedding of the name of what lies under it: a photograph's class, a drawing's
name, a letter, a colour and a shape. The language model never runs, so this takes minutes on a CPU and stage 3 has less to do.
In: a start folder of assemble.py, --parts, --data.  Out: a model folder with the taught projector.

N pictures, K = 64 visual tokens of a picture, C = 1536 folded features, D = 576 width of the language model.
"""

import argparse
import json
import random
import time
from pathlib import Path

import pictures
import torch
import torch.nn.functional as F
import views
from torch import Tensor

from tessella.checkpoint.builtin import write_nano
from tessella.checkpoint.read import Loaded, load
from tessella.image import MEAN, STD
from tessella.model.connectors import pixel_shuffle

SIDE = 224


def name_vector(loaded: Loaded, name: str) -> Tensor:
    """The mean embedding of a name's tokens (D,)."""
    ids = torch.tensor(loaded.tokenizer.encode(" " + name))
    return loaded.model.language_model.embed(ids).float().mean(0)


def features(loaded: Loaded, seen: Tensor) -> Tensor:
    """seen (B, 3, S, S) in 0..1 -> folded features (B, K, C)."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    tower = loaded.model.vision_model
    return pixel_shuffle(tower(((seen - mean) / std).to(loaded.model.dtype)))


def folded(labels: Tensor) -> Tensor:
    """What each patch shows (B, P, P) -> what each visual token shows (B, K, 4), its four patches."""
    return pixel_shuffle(labels[..., None])


def collect(loaded: Loaded, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, K, C), aims (N, K, D) and weights (N, K), 0 where a token has no aim."""
    data, parts, chance = Path(args.data), Path(args.parts), views.Chance(torch.device("cpu"), 1)
    wordnet = json.loads((data / "tiny-imagenet-classes.json").read_text())
    names, tiny = pictures.read_tar(data / "tiny-imagenet-train-0.tar", 64, 2)
    _, photos = pictures.read_tar(data / "howtocook.tar", 256, 2)
    keys, emoji, classes = pictures.read_emoji(parts, args.styles.split(","))
    words = pictures.render_words(parts, "train", args.pictures, 2, 1)
    said = json.loads((parts / "names.json").read_text(encoding="utf-8"))
    photo_names = {w: name_vector(loaded, wordnet[w].split(",")[0].lower()) for w in sorted({n.split("/")[0] for n in names})}
    drawn = torch.stack([name_vector(loaded, said[key]["en"]) for key in keys])
    letters = torch.stack([torch.zeros(drawn.shape[1])] + [name_vector(loaded, c)[None][0] for c in pictures.LETTERS])
    colours = torch.stack([name_vector(loaded, c) for c in views.COLOURS])
    shapes = torch.stack([name_vector(loaded, s) for s in views.SHAPES])
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(seen: Tensor, aim: Tensor, weight: Tensor) -> None:
        found.append((features(loaded, seen).to(torch.bfloat16), aim.to(torch.bfloat16), weight))

    order, clock = random.Random(1).sample(range(len(names)), args.pictures), time.monotonic()
    for some in torch.tensor(order).split(64):
        seen = views.jitter(views.crop(tiny[some], views.crop_boxes(chance, len(some), 0.35), SIDE), chance, 0.2)
        aim = torch.stack([photo_names[names[i].split("/")[0]] for i in some.tolist()])[:, None].expand(-1, 64, -1)
        keep(seen, aim, torch.full(aim.shape[:2], 0.5))
    print(f"photographs: {time.monotonic() - clock:.0f} s", flush=True)
    for _ in range(args.pictures * 6 // 10 // 64):
        seen, _, at = views.drawings(emoji, classes, photos, chance, 64, SIDE)
        keep(seen, *mean_of(drawn, folded(at), views.NONE))
    for _ in range(args.pictures * 5 // 10 // 64):
        seen, _, at = views.written((words.masks, words.columns, words.codes), photos, chance, 64, SIDE)
        keep(seen, *mean_of(letters, folded(at), 0))
    for _ in range(args.pictures * 3 // 10 // 64):
        scene = views.scenes(emoji, classes, photos, chance, 64, SIDE)
        sums = [
            mean_of(t, folded(at), views.NONE)
            for t, at in ((drawn, scene.drawing), (colours, scene.colour), (shapes, scene.shape))
        ]
        count = sum(weight for _, weight in sums).clamp(min=1)
        keep(scene.views, sum(aim for aim, _ in sums) / count[..., None], (count * (sums[0][1] + sums[1][1] > 0)).clamp(max=1))
    print(f"collected: {time.monotonic() - clock:.0f} s", flush=True)
    return tuple(torch.cat(part) for part in zip(*found, strict=True))


def mean_of(table: Tensor, labels: Tensor, none: int) -> tuple[Tensor, Tensor]:
    """labels (B, K, 4) -> the mean row of the table over those that show something (B, K, D), and 1 where any does (B, K)."""
    shown = labels != none
    rows = table[labels.clamp(min=0)] * shown[..., None]
    return rows.sum(2) / shown.sum(2).clamp(min=1)[..., None], shown.any(2).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, text in {
        "--model": "folder of assemble.py start",
        "--parts": "folder of collect.py",
        "--data": "the tars",
        "--out": "folder",
    }.items():
        parser.add_argument(flag, required=True, help=text)
    parser.add_argument("--styles", default="fluent3d,flat,noto,openmoji")
    parser.add_argument("--pictures", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()
    loaded = load(args.model, device="cpu")
    with torch.inference_mode():
        seen, aims, weights = collect(loaded, args)
    seen, aims, weights = (x.clone() for x in (seen, aims, weights))
    projector = loaded.model.mlp1.float()
    layers = torch.nn.Sequential(*projector)
    for parameter in layers.parameters():
        parameter.data = parameter.data.clone()
    layers.requires_grad_(True)
    optimiser = torch.optim.AdamW(layers.parameters(), lr=1e-3, weight_decay=0.01)
    scale = aims.float().square().mean().sqrt()
    for step in range(args.steps):
        optimiser.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 50) * (1 - step / args.steps)
        some = torch.randint(len(seen), (48,))
        with torch.autocast("cpu", torch.bfloat16):
            token = layers(seen[some])
        wrong = ((token.float() - aims[some].float()) / scale).square().mean(-1)
        loss = (wrong * weights[some]).sum() / weights[some].sum()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if step % 100 == 0:
            alike = F.cosine_similarity(token.float(), aims[some].float(), dim=-1)
            print(
                step,
                round(loss.item(), 4),
                "cosine",
                round(((alike * weights[some]).sum() / weights[some].sum()).item(), 4),
                flush=True,
            )
    state = loaded.model.state_dict()
    tower = {n: t.float() for n, t in state.items() if n.startswith("vision_model.")}
    print(write_nano(tower, {n: t.float() for n, t in state.items() if n.startswith("mlp1.")}, None, Path(args.out), force=True))


if __name__ == "__main__":
    main()
