"""Boxes and masks: a small transformer decoder over the tower's features, asked with what the super-link queries became.

In: levels of the tower (N, P, P, C) each, the tiles themselves (N, 3, S, S), words (N, K, 4, D) of K classes a picture.
Out: for Q objects a picture: scores (N, Q, K), boxes (N, Q, 4) as centre and size in 0 to 1, masks (N, Q, S/4, S/4) as logits.
Objects begin as the Q places of the feature maps that look most like one of the classes (two stages, as Grounding DINO), and
each layer looks around its box: attention is bent by a bell over the box, as in SMCA, so that few steps teach much.
Source: VisionLLM v2 (arXiv:2406.08394) for the queries; DETR (2005.12872), SMCA (2101.07448), MaskFormer (2107.06278).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN = float("-inf")


@dataclass(frozen=True)
class BoxConfig:
    """Sizes. The three widths of the model that it sits beside are told with it, so that a stranger's folder is noticed."""

    language_width: int
    vision_width: int
    layers_seen: tuple[int, ...]  # of the tower, counted like hidden states
    width: int = 192
    heads: int = 6
    layers: int = 3
    objects: int = 40  # most objects found in a picture
    mask_width: int = 32


@dataclass(frozen=True, eq=False)
class BoxGuess:
    """What one layer says of Q objects in N pictures."""

    scores: Tensor  # (N, Q, K) logits, -inf where a picture has fewer classes
    boxes: Tensor  # (N, Q, 4) centre x, centre y, width, height in 0 to 1
    masks: Tensor | None  # (N, Q, S/4, S/4) logits; the first stage has none


def mask_side(tile_side: int) -> int:
    """S/4, rounded up: the stem halves a tile twice."""
    return -(-tile_side // 4)


class BoxDecoder(nn.Module):
    """The decoder of [DET], [GRD] and [SEG]. Runs in float32 whatever the model does."""

    def __init__(self, config: BoxConfig):
        super().__init__()
        self.config, d = config, config.width
        self.words = nn.Sequential(nn.LayerNorm(config.language_width), nn.Linear(config.language_width, d))
        self.fuse = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(config.vision_width), nn.Linear(config.vision_width, d)) for _ in config.layers_seen
        )
        self.up = nn.ConvTranspose2d(d, d, 2, stride=2)
        self.down = nn.Conv2d(d, d, 3, stride=2, padding=1)
        self.level_norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(3))
        self.level = nn.Parameter(0.02 * torch.randn(3, d))
        self.place = nn.Linear(4 * PLACE_WIDTH, d)  # of a box, and of a place on a map
        # Edges are finer than patches: a thin look at the pixels themselves.
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.GELU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GELU()
        )  # fmt: skip
        self.stem_in = nn.Conv2d(64, d, 1)
        self.pixels = nn.Sequential(nn.Conv2d(d, d, 3, padding=1, groups=d), nn.GELU(), nn.Conv2d(d, config.mask_width, 1))
        self.first_box = mlp(d, 4)
        self.looks_like = nn.Linear(d, d)
        self.heat = nn.Parameter(torch.tensor(2.0))
        self.doubt = nn.Parameter(torch.tensor(-4.0))  # few of many places are objects: scores begin near 0.02
        self.layers = nn.ModuleList(DecoderLayer(d, config.heads) for _ in range(config.layers))
        self.moves = nn.ModuleList(mlp(d, 4) for _ in range(config.layers))
        self.outlines = mlp(d, config.mask_width)
        for move in (self.first_box, *self.moves):
            nn.init.zeros_(move[-1].weight)
            nn.init.zeros_(move[-1].bias)

    def forward(self, levels: Sequence[Tensor], tiles: Tensor, words: Tensor, asked: Tensor) -> list[BoxGuess]:
        """levels: (N, P, P, C) each; tiles (N, 3, S, S) normalised; words (N, K, 4, D); asked (N, K) bool, false on fillers.

        Gives the guesses of the first stage and of each layer; the last is the answer.
        """
        maps, pixels = self.see([level.float() for level in levels], tiles.float())
        memory, places, sizes = self.lay_out(maps)
        words = self.words(words.float())  # (N, K, 4, d)
        classes = words.mean(2)
        first = self._first_guess(memory, places, sizes, classes, asked)
        best = first.scores.amax(-1).topk(min(self.config.objects, memory.shape[1]), dim=1).indices  # (N, Q)
        boxes = first.boxes.detach().gather(1, best[..., None].expand(-1, -1, 4))
        x = memory.gather(1, best[..., None].expand(-1, -1, memory.shape[-1])).detach()
        spoken, silent = words.flatten(1, 2), ~asked.repeat_interleave(words.shape[2], dim=1)
        guesses = [first]
        for layer, move in zip(self.layers, self.moves, strict=True):
            x = layer(x, self.place(box_wave(boxes)), boxes, memory, places, spoken, silent)
            boxes = (move(x) + inverse_sigmoid(boxes)).sigmoid()
            masks = torch.einsum("nqc,nchw->nqhw", self.outlines(x), pixels)
            guesses.append(BoxGuess(self.compare(x, classes, asked), boxes, masks))
            boxes = boxes.detach()
        return guesses

    def see(self, levels: Sequence[Tensor], tiles: Tensor) -> tuple[list[Tensor], Tensor]:
        """Feature maps (N, d, H, W) at half, one and two times the tower's side, the finest first; pixels (N, m, S/4, S/4)."""
        base = torch.stack([fuse(level) for fuse, level in zip(self.fuse, levels, strict=True)]).sum(0).permute(0, 3, 1, 2)
        fine, coarse = self.up(base), self.down(base)
        edges = self.stem(tiles)
        wide = F.interpolate(fine, size=edges.shape[-2:], mode="bilinear", align_corners=False) + self.stem_in(edges)
        return [fine, base, coarse], self.pixels(wide)

    def lay_out(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Maps -> memory (N, M, d), each place's centre (M, 2) and the size (M,) of an object that it stands for."""
        memory, places, sizes = [], [], []
        for number, (one, norm) in enumerate(zip(maps, self.level_norms, strict=True)):
            h, w = one.shape[-2:]
            y, x = torch.meshgrid(torch.arange(h, device=one.device), torch.arange(w, device=one.device), indexing="ij")
            centre = torch.stack(((x + 0.5) / w, (y + 0.5) / h), dim=-1).flatten(0, 1).to(one)
            size = torch.full((h * w,), 3.0 / max(h, w), device=one.device)
            where = self.place(box_wave(torch.cat((centre, size[:, None].expand(-1, 2)), dim=-1)))
            memory.append(norm(one.flatten(2).transpose(1, 2)) + where + self.level[number])
            places.append(centre)
            sizes.append(size)
        return torch.cat(memory, dim=1), torch.cat(places), torch.cat(sizes)

    def compare(self, x: Tensor, classes: Tensor, asked: Tensor) -> Tensor:
        """x (N, Q, d), classes (N, K, d) -> logits (N, Q, K)."""
        likeness = torch.einsum("nqd,nkd->nqk", F.normalize(self.looks_like(x), dim=-1), F.normalize(classes, dim=-1))
        return (likeness * self.heat.exp() + self.doubt).masked_fill(~asked[:, None], HIDDEN)

    def _first_guess(self, memory: Tensor, places: Tensor, sizes: Tensor, classes: Tensor, asked: Tensor) -> BoxGuess:
        start = torch.cat((places, sizes[:, None].expand(-1, 2)), dim=-1).clamp(0.02, 0.98)
        boxes = (self.first_box(memory) + inverse_sigmoid(start)).sigmoid()
        return BoxGuess(self.compare(memory, classes, asked), boxes, None)


class DecoderLayer(nn.Module):
    """Objects look at each other, at the words, and at the picture around their boxes."""

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.among = nn.MultiheadAttention(d, heads, batch_first=True)
        self.listen = nn.MultiheadAttention(d, heads, batch_first=True)
        self.look = nn.MultiheadAttention(d, heads, batch_first=True)
        self.heads = heads
        self.reach = nn.Parameter(torch.linspace(-0.5, 1.0, heads))  # how far beyond its box each head looks (log)
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(4))
        self.feed = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(
        self, x: Tensor, where: Tensor, boxes: Tensor, memory: Tensor, places: Tensor, words: Tensor, silent: Tensor
    ) -> Tensor:
        """x, where (N, Q, d); boxes (N, Q, 4); memory (N, M, d); places (M, 2); words (N, 4 K, d), silent (N, 4 K) bool."""
        q = self.norms[0](x) + where
        x = x + self.among(q, q, self.norms[0](x), need_weights=False)[0]
        x = x + self.listen(self.norms[1](x), words, words, key_padding_mask=silent, need_weights=False)[0]
        bend = self._bell(boxes, places)
        x = x + self.look(self.norms[2](x) + where, memory, memory, attn_mask=bend, need_weights=False)[0]
        return x + self.feed(self.norms[3](x))

    def _bell(self, boxes: Tensor, places: Tensor) -> Tensor:
        """boxes (N, Q, 4), places (M, 2) -> what is added to the attention scores (N * heads, Q, M)."""
        centre, size = boxes[..., None, :2], boxes[..., None, 2:].clamp(min=0.05)
        far = (((places - centre) / size) ** 2).sum(-1)  # (N, Q, M)
        bent = -2 * far[:, None] * torch.exp(-self.reach)[None, :, None, None]
        return bent.flatten(0, 1)


PLACE_WIDTH = 32  # sines and cosines of each of a box's four numbers


def box_wave(boxes: Tensor) -> Tensor:
    """boxes (..., 4) in 0 to 1 -> (..., 4 * PLACE_WIDTH), sines and cosines of rising frequency."""
    rates = 2 * torch.pi * 2.0 ** torch.linspace(0, 5, PLACE_WIDTH // 2, device=boxes.device)
    turned = boxes[..., None] * rates
    return torch.cat((turned.sin(), turned.cos()), dim=-1).flatten(-2)


def inverse_sigmoid(x: Tensor) -> Tensor:
    return torch.logit(x.clamp(1e-4, 1 - 1e-4))


def mlp(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, out))


@dataclass(frozen=True, eq=False)
class Found:
    """One object that was found. box: left, top, right, bottom in 0 to 1; mask (H, W) bool over the whole picture."""

    box: tuple[float, float, float, float]
    score: float
    mask: Tensor


SURE = 0.3  # an object below this score is none
SAME = 0.7  # of two boxes of a class that overlap more, the likelier one stays


def found_objects(
    guess: BoxGuess, picture: int, which: int, size: tuple[int, int], *, single: bool = False, sure: float = SURE
) -> list[Found]:
    """The objects of class `which` in a picture, the likeliest first; single: at most one, as [GRD] wants.

    size: (height, width) of the masks.  sure: the lowest score that counts.
    """
    scores = guess.scores[picture, :, which].sigmoid()
    assert guess.masks is not None
    found: list[Found] = []
    for place in scores.argsort(descending=True).tolist():
        if float(scores[place]) < sure or (single and found):
            break
        box = corners(guess.boxes[picture, place]).clamp(0, 1)
        left, top, right, bottom = box.tolist()
        if any(overlap(box, torch.tensor(one.box)) > SAME for one in found) or right <= left or bottom <= top:
            continue
        wide = F.interpolate(guess.masks[picture, place][None, None], size=size, mode="bilinear", align_corners=False)
        mask = inside((wide[0, 0] > 0).cpu(), (left, top, right, bottom))
        found.append(Found((left, top, right, bottom), float(scores[place]), mask))
    return found


def inside(mask: Tensor, box: tuple[float, float, float, float], more: float = 0.05) -> Tensor:
    """The part of a mask (H, W) that lies in the box and a little around it."""
    h, w = mask.shape
    left, top, right, bottom = box
    x, y = (torch.arange(w) + 0.5) / w, (torch.arange(h) + 0.5) / h
    wide, high = more * (right - left), more * (bottom - top)
    across, down = (x >= left - wide) & (x <= right + wide), (y >= top - high) & (y <= bottom + high)
    return mask & down[:, None] & across[None]


def corners(boxes: Tensor) -> Tensor:
    """Centre and size (..., 4) -> left, top, right, bottom."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat((centre - half, centre + half), dim=-1)


def overlap(a: Tensor, b: Tensor) -> float:
    """Intersection over union of two boxes (4,) given by their corners."""
    sides = (torch.minimum(a[2:], b[2:].to(a)) - torch.maximum(a[:2], b[:2].to(a))).clamp(min=0)
    both = float(sides.prod())
    union = float((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod()) - both
    return both / union if union > 0 else 0.0
