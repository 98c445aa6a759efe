"""The loss of boxes and masks: guesses are matched with the truth one to one, and only what was matched is drawn to it.

In: the guesses of each layer for one picture, and the truth behind K routing tokens.  Out: a scalar.
Q guesses, K classes, M true objects.  Cost and loss: class (focal), L1 and GIoU of boxes, cross-entropy and dice of masks.
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
from tessella.scenes.truth import Truth

CLASS, L1, GIOU, MASK, DICE = 2.0, 5.0, 2.0, 5.0, 5.0  # weights as in Mask DINO, arXiv:2206.02777
FOCUS, SHARE = 2.0, 0.25  # gamma and alpha of the focal loss


@dataclass(frozen=True, eq=False)
class Targets:
    """The true objects of one picture."""

    classes: Tensor  # (M,) int64: behind which of the K tokens
    boxes: Tensor  # (M, 4) centre and size
    masks: Tensor  # (M, H, W) in 0 to 1; zero rows where nobody knows them
    has_masks: Tensor  # (M,) bool


def targets_of(truths: Sequence[Truth], mask_side: int, device: torch.device) -> Targets:
    """The truth behind K tokens, masks shrunk to (mask_side, mask_side)."""
    classes, boxes, masks, known = [], [], [], []
    for number, truth in enumerate(truths):
        for place, box in enumerate(truth.boxes):
            classes.append(number)
            boxes.append([(box.left + box.right) / 2, (box.top + box.bottom) / 2, box.right - box.left, box.bottom - box.top])
            known.append(bool(truth.masks))
            mask = truth.masks[place] if truth.masks else np.zeros((mask_side, mask_side), dtype=np.bool_)
            masks.append(F.adaptive_avg_pool2d(torch.from_numpy(np.asarray(mask, dtype=np.float32))[None], mask_side)[0])
    return Targets(
        torch.tensor(classes, dtype=torch.int64, device=device),
        torch.tensor(boxes, dtype=torch.float32, device=device).reshape(-1, 4),
        torch.stack(masks).to(device) if masks else torch.zeros((0, mask_side, mask_side), device=device),
        torch.tensor(known, dtype=torch.bool, device=device),
    )


def box_loss(guesses: Sequence[BoxGuess], picture: int, targets: Targets, asked: int) -> Tensor:
    """The summed loss of the first stage and every layer for one picture with `asked` classes."""
    total = guesses[0].boxes.new_zeros(())
    for guess in guesses:
        scores, boxes = guess.scores[picture, :, :asked], guess.boxes[picture]
        masks = None if guess.masks is None else guess.masks[picture]
        mine, theirs = match(scores, boxes, masks, targets)
        total = total + layer_loss(scores, boxes, masks, targets, mine, theirs)
    return total / len(guesses)


@torch.no_grad()
def match(scores: Tensor, boxes: Tensor, masks: Tensor | None, targets: Targets) -> tuple[Tensor, Tensor]:
    """Guesses (Q, …) and M true objects -> the places that belong together, in both; each at most once."""
    p = scores.sigmoid()[:, targets.classes]
    likely = SHARE * (1 - p) ** FOCUS * -(p + 1e-8).log() - (1 - SHARE) * p**FOCUS * -(1 - p + 1e-8).log()
    cost = CLASS * likely + L1 * torch.cdist(boxes, targets.boxes, p=1) - GIOU * pairwise_giou(boxes, targets.boxes)
    if masks is not None and len(targets.boxes):
        cost = cost + DICE * pairwise_dice(masks, targets.masks) * targets.has_masks
    mine, theirs = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(mine, device=scores.device), torch.as_tensor(theirs, device=scores.device)


def layer_loss(scores: Tensor, boxes: Tensor, masks: Tensor | None, targets: Targets, mine: Tensor, theirs: Tensor) -> Tensor:
    """The loss of one layer after matching; means over the objects."""
    wanted = torch.zeros_like(scores)
    wanted[mine, targets.classes[theirs]] = 1.0
    count = max(1, len(targets.boxes))
    loss = CLASS * focal(scores, wanted) / count
    if not len(mine):
        return loss
    near, true = boxes[mine], targets.boxes[theirs]
    loss = loss + L1 * F.l1_loss(near, true, reduction="sum") / count
    loss = loss + GIOU * (1 - paired_giou(near, true)).sum() / count
    known = targets.has_masks[theirs]
    if masks is None or not bool(known.any()):
        return loss
    drawn, shape = masks[mine][known], targets.masks[theirs][known]
    loss = loss + MASK * F.binary_cross_entropy_with_logits(drawn, shape, reduction="none").mean((1, 2)).sum() / count
    return loss + DICE * dice(drawn, shape).sum() / count


def focal(logits: Tensor, wanted: Tensor) -> Tensor:
    """Summed focal loss: what is easy weighs little."""
    plain = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    p = logits.sigmoid()
    miss = p * (1 - wanted) + (1 - p) * wanted
    return ((SHARE * wanted + (1 - SHARE) * (1 - wanted)) * miss**FOCUS * plain).sum()


def dice(logits: Tensor, wanted: Tensor) -> Tensor:
    """(M, H, W) logits and shares -> (M,) one minus twice the overlap over the sum."""
    p = logits.sigmoid().flatten(1)
    wanted = wanted.flatten(1)
    return 1 - (2 * (p * wanted).sum(1) + 1) / (p.sum(1) + wanted.sum(1) + 1)


def pairwise_dice(logits: Tensor, wanted: Tensor) -> Tensor:
    """(Q, H, W) and (M, H, W) -> (Q, M)."""
    p, wanted = logits.sigmoid().flatten(1), wanted.flatten(1)
    return 1 - (2 * p @ wanted.T + 1) / (p.sum(1)[:, None] + wanted.sum(1)[None] + 1)


def pairwise_giou(a: Tensor, b: Tensor) -> Tensor:
    """Boxes (Q, 4) and (M, 4) by centre and size -> (Q, M)."""
    return paired_giou(a[:, None].expand(-1, len(b), -1), b[None].expand(len(a), -1, -1))


def paired_giou(a: Tensor, b: Tensor) -> Tensor:
    """Boxes (…, 4) by centre and size -> (…): overlap, less what the smallest box around both holds of neither."""
    a, b = corners(a), corners(b)
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    outer = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=1e-6).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inner
    return inner / union.clamp(min=1e-6) - (outer - union) / outer
