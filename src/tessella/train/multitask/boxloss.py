"""The loss of boxes and masks: guesses are matched with the truth one to one, and only what was matched is drawn to it.

In: the guesses of each layer for N pictures, and what is true of them.  Out: a loss a picture (N,).
Q guesses, K classes, M true objects of the fullest picture, G layers that guess.  Cost and loss: class (focal), L1 and GIoU of
boxes, cross-entropy and dice of masks. All pictures and layers go at once, and a GPU is waited for a single time: one by one,
64 pictures cost 256 waits a step.
Source: DETR, arXiv:2005.12872, for the matching and auxiliary losses; focal loss 1708.02002; dice of V-Net 1606.04797.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from tessella.model.decoders.boxes import BoxGuess, corners
from tessella.train.multitask.rows import Aim
from tessella.transfer import sent

CLASS, L1, GIOU, MASK, DICE = 2.0, 5.0, 2.0, 5.0, 5.0  # weights as in Mask DINO, arXiv:2206.02777
FOCUS, SHARE = 2.0, 0.25  # gamma and alpha of the focal loss
SILENT = -50.0  # the logit of a class that was not asked for: no loss, and no infinity times nothing


@dataclass(frozen=True, eq=False)
class Targets:
    """The true objects of N pictures, fillers behind those of a picture with fewer."""

    counts: tuple[int, ...]  # objects of each picture
    classes: Tensor  # (N, M) int64: behind which of the K tokens
    boxes: Tensor  # (N, M, 4) centre and size
    masks: Tensor  # (N, M, H, W) in 0 to 1; zeros where nobody knows them
    has_masks: Tensor  # (N, M) bool


def targets_of(pictures: Sequence[Sequence[Aim]], device: torch.device) -> Targets:
    """pictures: for each, what is aimed at behind each of its tokens."""
    counts = tuple(sum(len(aim.boxes) for aim in some) for some in pictures)
    side, most = pictures[0][0].masks.shape[-1], max(counts)
    classes = np.zeros((len(pictures), most), dtype=np.int64)
    boxes = np.full((len(pictures), most, 4), 0.5, dtype=np.float32)
    masks = np.zeros((len(pictures), most, side, side), dtype=np.float16)
    known = np.zeros((len(pictures), most), dtype=np.bool_)
    for number, some in enumerate(pictures):
        at = 0
        for which, aim in enumerate(some):
            mine = slice(at, at + len(aim.boxes))
            classes[number, mine], boxes[number, mine] = which, aim.boxes
            masks[number, mine], known[number, mine] = aim.masks, aim.known
            at = mine.stop
    there = [sent(torch.from_numpy(one), device) for one in (classes, boxes, masks, known)]
    return Targets(counts, there[0], there[1], there[2].float(), there[3])


def box_loss(guesses: Sequence[BoxGuess], targets: Targets, asked: Tensor) -> Tensor:
    """The mean loss (N,) of the first stage and every layer. asked (N, K) bool: false on fillers."""
    places = match(guesses, targets)
    losses = [layer_loss(guess, targets, asked, mine) for guess, mine in zip(guesses, places, strict=True)]
    objects = sent(torch.tensor([max(1, count) for count in targets.counts]), places.device)
    return torch.stack(losses).mean(0) / objects


@torch.no_grad()
def match(guesses: Sequence[BoxGuess], targets: Targets) -> Tensor:
    """(G, N, M): the guess that belongs to each true object, each at most once; -1 for fillers, and where guesses are too few."""
    # A loss that is no number is told by who watches it; the matching must not stop before that.
    costs = np.nan_to_num(torch.cat([cost_of(guess, targets) for guess in guesses], dim=1).cpu().numpy())
    places = np.full((len(guesses), *targets.classes.shape), -1, dtype=np.int64)
    for number, count in enumerate(targets.counts):
        start = 0
        for layer, guess in enumerate(guesses):
            end = start + guess.boxes.shape[1]
            mine, theirs = linear_sum_assignment(costs[number, start:end, :count])
            places[layer, number, theirs] = mine
            start = end
    return sent(torch.from_numpy(places), targets.classes.device)


def cost_of(guess: BoxGuess, targets: Targets) -> Tensor:
    """What it costs to match each guess with each true object: (N, Q, M)."""
    scores, boxes = guess.scores, guess.boxes
    p = scores.sigmoid().gather(2, targets.classes[:, None].expand(-1, scores.shape[1], -1))
    likely = SHARE * (1 - p) ** FOCUS * -(p + 1e-8).log() - (1 - SHARE) * p**FOCUS * -(1 - p + 1e-8).log()
    near = torch.cdist(boxes, targets.boxes, p=1)
    cost = CLASS * likely + L1 * near - GIOU * paired_giou(boxes[:, :, None], targets.boxes[:, None])
    if guess.masks is None:
        return cost
    return cost + DICE * pairwise_dice(guess.masks, targets.masks) * targets.has_masks[:, None]


def layer_loss(guess: BoxGuess, targets: Targets, asked: Tensor, places: Tensor) -> Tensor:
    """The loss (N,) of one layer after matching, places (N, M), summed over a picture's objects."""
    matched, at = (places >= 0).float(), places.clamp(min=0)
    scores = guess.scores.masked_fill(~asked[:, None], SILENT)
    n, q, k = scores.shape
    wanted = scores.new_zeros(n, q * k).scatter_add(1, at * k + targets.classes, matched).view(n, q, k)
    loss = CLASS * focal(scores, wanted)
    near = guess.boxes.gather(1, at[..., None].expand(-1, -1, 4))
    loss = loss + L1 * ((near - targets.boxes).abs().sum(-1) * matched).sum(1)
    loss = loss + GIOU * ((1 - paired_giou(near, targets.boxes)) * matched).sum(1)
    if guess.masks is not None:
        known = matched * targets.has_masks
        drawn = guess.masks.gather(1, at[..., None, None].expand(-1, -1, *guess.masks.shape[-2:]))
        missed = F.binary_cross_entropy_with_logits(drawn, targets.masks, reduction="none").mean((2, 3))
        loss = loss + ((MASK * missed + DICE * dice(drawn, targets.masks)) * known).sum(1)
    return loss


def focal(logits: Tensor, wanted: Tensor) -> Tensor:
    """(N, Q, K) -> focal loss summed over a picture (N,): what is easy weighs little."""
    plain = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    p = logits.sigmoid()
    miss = p * (1 - wanted) + (1 - p) * wanted
    return ((SHARE * wanted + (1 - SHARE) * (1 - wanted)) * miss**FOCUS * plain).sum((1, 2))


def dice(logits: Tensor, wanted: Tensor) -> Tensor:
    """(…, H, W) logits and shares -> (…): one minus twice the overlap over the sum."""
    p, wanted = logits.sigmoid().flatten(-2), wanted.flatten(-2)
    return 1 - (2 * (p * wanted).sum(-1) + 1) / (p.sum(-1) + wanted.sum(-1) + 1)


def pairwise_dice(logits: Tensor, wanted: Tensor) -> Tensor:
    """(N, Q, H, W) and (N, M, H, W) -> (N, Q, M)."""
    p, wanted = logits.sigmoid().flatten(2), wanted.flatten(2)
    return 1 - (2 * p @ wanted.transpose(1, 2) + 1) / (p.sum(2)[..., None] + wanted.sum(2)[:, None] + 1)


def paired_giou(a: Tensor, b: Tensor) -> Tensor:
    """Boxes (…, 4) by centre and size -> (…): overlap, less what the smallest box around both holds of neither."""
    a, b = corners(a), corners(b)
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    outer = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=1e-6).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inner
    return inner / union.clamp(min=1e-6) - (outer - union) / outer
