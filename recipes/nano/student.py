"""The tower as a student: the heads that only training needs, and what each kind of view teaches.

In: views (B, 3, S, S) in 0..1.  Out: losses by name.
B views, S side in px, P patches a side, C width of the tower.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import pictures
import torch
import torch.nn.functional as F
import views
from torch import Tensor, nn

from tessella.image import MEAN, STD
from tessella.model.vision import VisionTower

if TYPE_CHECKING:
    from tower import Parts, Plan


class Student(nn.Module):
    """The tower and the heads that only training needs."""

    def __init__(self, tower: VisionTower, labels: int, drawings: int):
        super().__init__()
        width = tower.config.hidden_size
        self.tower = tower
        self.norm = nn.LayerNorm(width)
        self.map = nn.Linear(width, 352)
        self.pooled = nn.Linear(width, 1280)
        self.logits = nn.Linear(width, 1000)
        self.label = nn.Linear(width, labels)
        self.drawing = nn.Linear(width, drawings)
        self.colour = nn.Linear(width, len(views.COLOURS))
        self.shape = nn.Linear(width, len(views.SHAPES))
        self.count = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 5))
        self.letter = nn.Linear(width, len(pictures.LETTERS) + 1)
        self.query = nn.Parameter(torch.randn(pictures.LONGEST, width) * 0.5)
        self.read = nn.MultiheadAttention(width, 6, batch_first=True)

    def forward(self, seen: Tensor) -> Tensor:
        """seen (B, 3, S, S) in 0..1 -> normed features (B, P, P, C)."""
        mean, std = (torch.tensor(v, device=seen.device)[:, None, None] for v in (MEAN, STD))
        return self.norm(self.tower((seen - mean) / std))

    def spell(self, features: Tensor) -> Tensor:
        """features (B, P, P, C) -> letters (B, 8, 53)."""
        flat = features.flatten(1, 2)
        read, _ = self.read(self.query.expand(len(flat), -1, -1), flat, flat, need_weights=False)
        return self.letter(self.query + read)


def photo_loss(student: Student, parts: "Parts", drawn: list[tuple[Tensor, ...]], features: Tensor) -> dict[str, Tensor]:
    """Distillation of logits, pooled features and map, and the labels where there are any."""
    label, logits, pooled, maps = (torch.cat(part) for part in list(zip(*drawn, strict=True))[1:])
    mean = features.mean((1, 2))
    side = features.shape[1]
    aim = F.interpolate((maps.float() - parts.spread["maps"][0]) / parts.spread["maps"][1], size=side, mode="bilinear")
    said = F.log_softmax(student.logits(mean).float(), -1)
    return {
        "map": F.smooth_l1_loss(student.map(features).float(), aim.permute(0, 2, 3, 1)),
        "pooled": F.smooth_l1_loss(
            student.pooled(mean).float(), (pooled.float() - parts.spread["pooled"][0]) / parts.spread["pooled"][1]
        ),
        "logits": F.kl_div(said, F.log_softmax(logits.float(), -1), log_target=True, reduction="batchmean"),
        "label": 0.5 * F.cross_entropy(student.label(mean).float(), label, label_smoothing=0.1),
    }


def drawn_loss(
    student: Student, parts: "Parts", chance: views.Chance, plan: "Plan"
) -> tuple[Tensor, Callable[[Tensor], dict[str, Tensor]]]:
    """The views (B, 3, S, S) of drawings, scenes and words, and the function from their features to their losses."""
    photos = parts.large.pixels
    single, label, at = views.drawings(parts.emoji, parts.emoji_class, photos, chance, plan.drawings, plan.full_px)
    scene = views.scenes(parts.emoji, parts.emoji_class, photos, chance, plan.scenes, plan.full_px)
    page, codes, letters = views.written(parts.words, photos, chance, plan.words, plan.full_px)

    def losses(features: Tensor) -> dict[str, Tensor]:
        one, many, text = features.split((plan.drawings, plan.scenes, plan.words))

        def patch(head: nn.Module, of: Tensor, truth: Tensor) -> Tensor:
            return F.cross_entropy(head(of).float().flatten(0, 2), truth.flatten())

        letter = student.letter(text).float().flatten(0, 2)
        weight = torch.where(letters > 0, 1.0, 0.1).flatten()  # most patches show no letter
        return {
            "drawing": 0.4 * F.cross_entropy(student.drawing(one.mean((1, 2))).float(), label, label_smoothing=0.05),
            "drawing_at": 0.2 * patch(student.drawing, one, at) + 0.2 * patch(student.drawing, many, scene.drawing),
            "colour_at": 0.2 * patch(student.colour, many, scene.colour),
            "shape_at": 0.2 * patch(student.shape, many, scene.shape),
            "count": 0.3 * F.cross_entropy(student.count(many.mean((1, 2))).float(), scene.count),
            "letter_at": 0.4 * (F.cross_entropy(letter, letters.flatten(), reduction="none") * weight).sum() / weight.sum(),
            "spell": 0.6 * F.cross_entropy(student.spell(text).float().flatten(0, 1), codes.flatten()),
        }

    return torch.cat((single, scene.views, page)), losses
