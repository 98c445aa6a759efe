"""Between stages 1 and 2, where no GPU is at hand: the projector learns the language model's own words for what a patch shows.

Each visual token is pulled towards the embedding of the name of what lies under it: a photograph's class, a drawing's
name, a letter, a colour and a shape. Beside that, linear heads that are thrown away afterwards must read the truth from the
token: without them it keeps the names and forgets what tells apart the things that have none yet. The language model never
runs, so this takes minutes on a CPU and stage 3 has less to do.
In: a start folder of assemble.py, --parts, --data.  Out: a model folder with the taught projector.

N pictures, K = 64 visual tokens of a picture, 4 patches in each, C = 1536 folded features, D = 576 width of the language model.
"""

import argparse
from pathlib import Path

import pictures
import torch
import torch.nn.functional as F
import views
from anchor_data import BATCH, Names, Seen, collect, restore, store
from torch import Tensor, nn

from tessella.checkpoint.builtin import write_nano
from tessella.checkpoint.packing import read_packed
from tessella.checkpoint.read import Loaded, load

PHOTO_WEIGHT = 0.5  # of a photograph's tokens: not all of them lie on what it is called after
RATE, REPORT = 1.5e-3, 100


class Aims:
    """The embedding that each token is pulled towards, from the names' own embeddings."""

    def __init__(self, loaded: Loaded, names: Names):
        def table(words: list[str]) -> Tensor:
            rows = [loaded.model.language_model.embed(torch.tensor(loaded.tokenizer.encode(" " + w))) for w in words]
            return torch.stack([row.detach().float().mean(0) for row in rows])

        self.photos, self.drawings = table(names.photos), table(names.drawings)
        self.colours, self.shapes = table(list(views.COLOURS)), table(list(views.SHAPES))
        self.letters = table(["-", *pictures.LETTERS])

    def __call__(self, some: Seen) -> tuple[Tensor, Tensor]:
        """-> aims (B, K, D) and weights (B, K), 0 where a token has none."""
        kinds = [
            (self.drawings, some.drawing),
            (self.colours, some.colour),
            (self.shapes, some.shape),
            (self.letters, some.letter),
        ]
        means = [mean_of(rows, labels) for rows, labels in kinds]
        count = torch.stack([weight for _, weight in means]).sum(0)
        aim = torch.stack([aim for aim, _ in means]).sum(0) / count.clamp(min=1)[..., None]
        is_photo = (some.photo >= 0)[:, None]
        whole = self.photos[some.photo.clamp(min=0).long()][:, None]
        return torch.where(is_photo[..., None], whole, aim), torch.where(is_photo, PHOTO_WEIGHT, count.clamp(max=1))


def mean_of(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """labels (B, K, 4) -> the mean of their rows over those that show something (B, K, D), and 1 where any does (B, K)."""
    shown = labels >= 0
    found = rows[labels.clamp(min=0).long()] * shown[..., None]
    return found.sum(2) / shown.sum(2).clamp(min=1)[..., None], shown.any(2).float()


class Heads(nn.Module):
    """What must be readable from the tokens by one linear layer: of each, of its four patches, of all together."""

    def __init__(self, names: Names, folded: int, width: int):
        super().__init__()
        self.norm = nn.RMSNorm(width)  # as the language model reads them
        self.photo, self.drawn = nn.Linear(width, len(names.photos)), nn.Linear(width, len(names.drawings))
        self.count = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 5))
        self.drawing = nn.Linear(width, len(names.drawings))
        self.colour, self.shape = nn.Linear(width, len(views.COLOURS)), nn.Linear(width, len(views.SHAPES))
        self.letter = nn.Linear(width, 4 * (len(pictures.LETTERS) + 1))
        self.again = nn.Linear(width, folded)

    def forward(self, tokens: Tensor, some: Seen) -> dict[str, Tensor]:
        """tokens (B, K, D) -> losses by name."""
        read = self.norm(tokens.float())
        mean = read.mean(1)

        def wrong(logits: Tensor, labels: Tensor) -> Tensor:
            chosen = labels.flatten() >= 0
            if not chosen.any():
                return logits.sum() * 0
            return F.cross_entropy(logits.flatten(0, -2)[chosen].float(), labels.flatten()[chosen].long(), label_smoothing=0.05)

        wanted = F.layer_norm(some.features.float(), some.features.shape[-1:])
        return {
            "photo": wrong(self.photo(mean), some.photo),
            "drawn": wrong(self.drawn(mean), some.drawn),
            "count": wrong(self.count(mean), some.count),
            "drawing": wrong(self.drawing(read), some.drawing.amax(2)),
            "colour": wrong(self.colour(read), some.colour.amax(2)),
            "shape": wrong(self.shape(read), some.shape.amax(2)),
            "letter": wrong(self.letter(read).unflatten(-1, (4, -1)), some.letter),
            "again": 2 * F.smooth_l1_loss(self.again(read).float(), wanted),
        }


def learn(loaded: Loaded, seen: Seen, names: Names, steps: int) -> nn.Sequential:
    """The projector, taught; it learns in float32 and multiplies in bfloat16."""
    projector = loaded.model.mlp1.float()
    layers = nn.Sequential(*projector)
    for parameter in layers.parameters():
        parameter.data = parameter.data.clone()
    layers.requires_grad_(True)
    aims, heads = Aims(loaded, names), Heads(names, seen.features.shape[-1], loaded.config.language.hidden_size)
    learning = [*layers.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(learning, lr=RATE, weight_decay=0.02, betas=(0.9, 0.98))
    scale = aims.drawings.square().mean().sqrt()
    chance = torch.Generator().manual_seed(0)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 50) * (1 - step / steps)
        index = torch.randint(len(seen.photo), (BATCH,), generator=chance)
        some = Seen(**{name: value[index] for name, value in vars(seen).items()})
        aim, weight = aims(some)
        with torch.autocast("cpu", torch.bfloat16):
            tokens = layers(some.features)
            losses = heads(tokens, some)
        off = ((tokens.float() - aim) / scale).square().mean(-1)
        losses["anchor"] = 2 * (off * weight).sum() / weight.sum()
        sum(losses.values()).backward()  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step % REPORT == 0 or step + 1 == steps:
            print(step, {name: round(value.item(), 3) for name, value in losses.items()}, flush=True)
    return layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, text in {
        "--model": "folder of assemble.py start",
        "--parts": "folder of collect.py",
        "--data": "the tars",
        "--out": "folder",
        "--seen": "file of what the tower said; made when it is not there, about 200 KB a picture",
    }.items():
        parser.add_argument(flag, required=True, help=text)
    parser.add_argument("--lora", help="packed LoRA of an earlier round, to go on from it (assemble.py pack --lora keeps it)")
    parser.add_argument("--styles", default="fluent3d,flat,noto,openmoji")
    parser.add_argument("--pictures", type=int, default=32000)
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()
    loaded = load(args.model, device="cpu")
    if not Path(args.seen).is_file():
        store(Path(args.seen), *collect(loaded, args))
    seen, names = restore(Path(args.seen))
    learn(loaded, seen, names, args.steps)
    state = {name: value.float() for name, value in loaded.model.state_dict().items()}
    tower, projector = ({n: t for n, t in state.items() if n.startswith(p)} for p in ("vision_model.", "mlp1."))
    lora = read_packed(Path(args.lora)) if args.lora else None
    print(write_nano(tower, projector, lora, Path(args.out), force=True))


if __name__ == "__main__":
    main()
