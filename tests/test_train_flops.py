"""Model FLOP utilisation: the formula against sums done by hand for InternVL2-2B."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("peft", reason="teaching goes through PEFT, which is not installed: it is in the train extra")

from tessella.checkpoint.blank import blank_model
from tessella.checkpoint.published import published_config
from tessella.train.flops import rate_of, work_of
from tessella.train.lora import prepare
from tessella.train.recipe import Recipe

BODY, HEAD = 1_509.9e6, 189.5e6  # weights of the layers of InternLM2-1.8B, and of its head
LORA = 24 * 128 * (3 * 2048 + 4096 + 2 * 2048 + 3 * (2048 + 8192))  # rank 128; q, k and v have an A each
TOKENS, TILES = 3_428, 13
ATTENTION = 2 * TOKENS**2 * 2048 * 24
TILE, PROJECTOR = 724e9, 6.4e9  # a tile through InternViT-300M and through the projector


def work(**changes: object) -> float:
    """TFLOP of one sample of 13 tiles and 100 answer tokens."""
    recipe = Recipe(lora_rank=128, **changes)
    model = blank_model(published_config("InternVL2-2B"))
    with torch.device("meta"):
        prepare(model, recipe)
    pack = SimpleNamespace(lengths=(TOKENS,), targets=range(100), tiles=range(TILES))
    tiles = 0 if recipe.cache_features and recipe.tower == "frozen" else TILES
    return work_of(model, recipe).of(pack, tiles) / 1e12  # type: ignore[arg-type]


def test_lora_with_a_frozen_tower_costs_what_the_hand_says() -> None:
    language = 2 * 2 * BODY * TOKENS + 3.5 * ATTENTION + 6 * LORA * TOKENS + 2 * 2 * HEAD * 100
    cached = (language + 3 * PROJECTOR * TILES) / 1e12
    assert work() == pytest.approx(cached, rel=5e-3) and cached == pytest.approx(27.9, abs=0.1)
    assert work(cache_features=False) == pytest.approx(cached + TILE * TILES / 1e12, rel=5e-3)


def test_teaching_everything_costs_three_times_forward() -> None:
    whole = 3 * 2 * (BODY * TOKENS + HEAD * 100) + 3.5 * ATTENTION
    linear, attention = (724e9 - 4 * 1025**2 * 1024 * 24) * TILES, 4 * 1025**2 * 1024 * 24 * TILES
    whole += 3 * linear + 3.5 * attention + 3 * PROJECTOR * TILES
    assert work(language="full", tower="full") == pytest.approx(whole / 1e12, rel=5e-3)


def test_layers_that_are_kept_cost_nothing() -> None:
    recipe = Recipe(lora_layers=6, projector="frozen")
    model = blank_model(published_config("InternVL2-2B"))
    with torch.device("meta"):
        prepare(model, recipe)
    assert work_of(model, recipe, lowest=18).attention == pytest.approx(work_of(model, recipe).attention / 4)


def test_a_machines_rate_is_a_number() -> None:
    assert 1e8 < rate_of(torch.device("cpu"), torch.float32) < 1e14
