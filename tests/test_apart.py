"""The closed form that turns a LoRA aside from text: the least of its sum of squares, and what its two ends are."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="teaching goes through PEFT, which is not installed: it is in the train extra")

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "nano"))

from apart import turned

WIDTH, RANK, OUT = 12, 3, 7


def moment(rows: torch.Tensor) -> torch.Tensor:
    return (rows.T @ rows / len(rows)).double()


def loss(a: torch.Tensor, before: torch.Tensor, b: torch.Tensor, seen: torch.Tensor, text: torch.Tensor, weight: float) -> float:
    change, kept = b @ a, b @ before
    off = change - kept
    return float(((off @ seen.float()) * off).sum() + weight * ((change @ text.float()) * change).sum())


def test_no_other_a_of_the_same_rank_does_better() -> None:
    chance = torch.Generator().manual_seed(0)
    seen, text = (moment(torch.randn(40, WIDTH, generator=chance)) for _ in range(2))
    before, b = torch.randn(RANK, WIDTH, generator=chance), torch.randn(OUT, RANK, generator=chance)
    best = turned(before, seen, text, 0.5)
    least = loss(best, before, b, seen, text, 0.5)
    assert least < loss(before, before, b, seen, text, 0.5)
    for _ in range(50):
        assert least < loss(best + 0.05 * torch.randn(RANK, WIDTH, generator=chance), before, b, seen, text, 0.5)


def test_without_weight_nothing_changes_and_where_text_alone_lies_nothing_is_left() -> None:
    chance = torch.Generator().manual_seed(1)
    before = torch.randn(RANK, WIDTH, generator=chance)
    seen = moment(torch.randn(60, WIDTH, generator=chance))
    assert (turned(before, seen, seen, 0.0) - before).abs().max() < 1e-3
    mask = torch.zeros(WIDTH)
    mask[: WIDTH // 2] = 1
    pictures, words = torch.randn(60, WIDTH, generator=chance) * mask, torch.randn(60, WIDTH, generator=chance) * (1 - mask)
    apart = turned(before, moment(pictures), moment(words), 1.0)
    assert (pictures @ (apart - before).T).abs().max() < 1e-3 and (words @ apart.T).abs().max() < 1e-3
