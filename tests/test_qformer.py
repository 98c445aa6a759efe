"""The Q-Former against transformers, its three masks against a disturbed other side, its losses against what chance gives."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from relatives import spread
from tessella.checkpoint.relative_names import BLIP2
from tessella.config import QFormerConfig
from tessella.errors import ConfigError, TrainingError
from tessella.model.qformer import QFormer, Queries, sight
from tessella.train import qformer as module
from tessella.train.qformer import StageOne, hard_negatives, same_text, similarities

WIDTH, QUERIES, VOCABULARY = 24, 5, 50
SMALL = QFormerConfig(WIDTH, 48, num_layers=4, num_heads=2, image_width=32, num_queries=QUERIES, text=True, vocab_size=VOCABULARY)
LARGE = QFormerConfig(768, 3072, num_layers=12, num_heads=12, image_width=1408)


def batch(n: int = 3, t: int = 7, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, ids, and which of them are real: texts of several lengths."""
    chance = torch.Generator().manual_seed(seed)
    lengths = torch.arange(n) % 3 + t - 2
    real = torch.arange(t) < lengths[:, None]
    ids = torch.randint(3, VOCABULARY, (n, t), generator=chance)
    ids[:, 0] = 1
    return torch.randn(n, 10, 32, generator=chance), ids.masked_fill(~real, 0), real


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, StageOne]:
    """transformers' retrieval model, random, and ours with its weights, renamed by the table that reads BLIP-2's folders."""
    t = pytest.importorskip("transformers", reason="transformers is the oracle here")
    former = t.Blip2QFormerConfig(
        hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, encoder_hidden_size=32,
        vocab_size=VOCABULARY, use_qformer_text_input=True,
    )  # fmt: skip
    tower = t.Blip2VisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    config = t.Blip2Config(vision_config=tower, qformer_config=former, num_query_tokens=QUERIES, image_text_hidden_size=16)
    theirs = t.Blip2ForImageTextRetrieval(config).eval()
    spread(theirs)
    state, ours = theirs.state_dict(), StageOne(SMALL, shared_width=16).eval()
    names = {ours.replace("mlp1.0.", "queries."): stored for ours, stored in BLIP2.items() if "mlp1.0." in ours}
    layer = "queries.former.layers.#."
    names |= {f"{layer}text.{part}": f"qformer.encoder.layer.#.{name}" for part, name in TEXT.items()}
    names |= {"queries.former.words": "embeddings.word_embeddings", "queries.former.places": "embeddings.position_embeddings"}
    names |= {"picture_head": "vision_projection", "text_head": "text_projection", "match_head": "itm_head"}
    found = {}
    for name in ours.state_dict():
        path, _, leaf = name.rpartition(".")
        number = next((part for part in path.split(".") if part.isdigit()), "")
        key = path.replace(f"layers.{number}.", "layers.#.") if number else path
        if key in names:
            found[name] = state[f"{names[key].replace('#', number)}.{leaf}"]
        elif name in names:
            found[name] = state[names[name]]
    missing, _ = ours.load_state_dict(found, strict=False)
    assert {name.split(".")[0] for name in missing} == {"word_head", "word_bias", "temperature"}
    return theirs, ours


TEXT = {"fc1": "intermediate.dense", "fc2": "output.dense", "norm": "output.LayerNorm"}


@torch.inference_mode()
def test_queries_equal_transformers(pair: tuple[nn.Module, StageOne]) -> None:
    theirs, ours = pair
    image, _, _ = batch()
    wanted = theirs.qformer(theirs.query_tokens.expand(3, -1, -1), encoder_hidden_states=image).last_hidden_state
    assert wanted.std() > 0.1 and (ours.queries(image) - wanted).abs().max() < 1e-5


@torch.inference_mode()
def test_contrast_and_matching_equal_transformers(pair: tuple[nn.Module, StageOne], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = pair
    image, ids, real = batch()
    monkeypatch.setattr(theirs.vision_model, "forward", lambda **_: (image,))
    given = {"pixel_values": torch.zeros(1), "input_ids": ids, "attention_mask": real.long(), "return_dict": False}
    matched = theirs(**given, use_image_text_matching_head=True)[0]
    assert (ours.match_logits(image, ids, real) - matched).abs().max() < 1e-5
    _, _, texts, pictures, _, _ = theirs(**given)
    assert (ours.pictures(image) - pictures).abs().max() < 1e-5 and (ours.texts(ids, real) - texts).abs().max() < 1e-5


def test_published_parameter_counts_are_met() -> None:
    """BLIP-2 prints 188 M with both halves; the tutorial's "100 M" is the half that reads pictures."""

    def millions(module: nn.Module) -> float:
        return sum(weight.numel() for weight in module.parameters()) / 1e6

    with torch.device("meta"):
        both = QFormerConfig(768, 3072, num_layers=12, num_heads=12, image_width=1408, text=True, vocab_size=30523)
        assert millions(Queries(LARGE)) == pytest.approx(105.1, abs=0.1)
        assert millions(StageOne(both)) == pytest.approx(186.7, abs=0.3)


# ---- the masks, by disturbing the forbidden side


@torch.inference_mode()
@pytest.mark.parametrize(
    ("kind", "queries_see_text", "text_sees_queries"),
    [("apart", False, False), ("together", True, True), ("generate", False, True)],
)
def test_who_must_not_see_sees_exactly_no_change(kind: str, queries_see_text: bool, text_sees_queries: bool) -> None:
    former = QFormer(SMALL).eval()
    spread(former)
    image, ids, real = batch()
    queries = torch.randn(3, QUERIES, WIDTH)
    seen = sight(kind, QUERIES, real)  # type: ignore[arg-type]
    plain = former(queries, image, ids, seen)
    other_text = former(queries, image, ids.masked_fill(real, 7), seen)
    other_queries = former(queries + 1.5 * torch.randn_like(queries), image, ids, seen)
    assert torch.equal(plain[:, :QUERIES], other_text[:, :QUERIES]) is not queries_see_text
    words = torch.cat([state[QUERIES:][kept] for state, kept in zip(plain, real, strict=True)])
    changed = torch.cat([state[QUERIES:][kept] for state, kept in zip(other_queries, real, strict=True)])
    assert torch.equal(words, changed) is not text_sees_queries


@torch.inference_mode()
def test_text_that_is_generated_does_not_see_what_follows() -> None:
    former = QFormer(SMALL).eval()
    spread(former)
    image, ids, real = batch()
    queries, changed = torch.randn(3, QUERIES, WIDTH), ids.clone()
    changed[:, 4] = 9
    for kind, blind in (("generate", True), ("together", False)):
        seen = sight(kind, QUERIES, real)  # type: ignore[arg-type]
        a, b = former(queries, image, ids, seen), former(queries, image, changed, seen)
        assert torch.equal(a[:, : QUERIES + 4], b[:, : QUERIES + 4]) is blind
        assert not torch.equal(a[:, QUERIES + 4 :], b[:, QUERIES + 4 :])


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["apart", "together", "generate"])
def test_padding_is_seen_by_nobody(kind: str) -> None:
    former = QFormer(SMALL).eval()
    spread(former)
    image, ids, real = batch()
    queries, seen = torch.randn(3, QUERIES, WIDTH), sight(kind, QUERIES, real)  # type: ignore[arg-type]
    whole = torch.cat((real.new_ones(3, QUERIES), real), dim=1)
    a, b = (former(queries, image, text, seen) for text in (ids, ids.masked_fill(~real, 8)))
    assert torch.equal(a[whole], b[whole])


# ---- the losses


def test_losses_begin_where_chance_begins() -> None:
    """ln(pairs) for contrast, that of one match in three for matching, ln(vocabulary) for generation."""
    torch.manual_seed(0)
    stage = StageOne(SMALL, shared_width=16)
    with torch.no_grad():
        stage.temperature.fill_(10.0)  # at 0.07 random vectors of a small width are not alike
    image, ids, real = batch(n=16)
    losses = stage(image, ids, real, generate_id=2, chance=torch.Generator().manual_seed(0))
    contrast, match, generate = (float(loss.detach()) for loss in (losses.contrast, losses.match, losses.generate))
    assert contrast == pytest.approx(math.log(16), abs=0.05)
    assert 0.63 < match < math.log(2) + 0.1
    assert generate == pytest.approx(math.log(VOCABULARY), abs=0.1)


def test_all_three_losses_fall_on_a_batch_that_is_seen_again_and_again() -> None:
    torch.manual_seed(0)
    stage, chance = StageOne(replace(SMALL, num_layers=2), shared_width=16), torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(stage.parameters(), lr=5e-3)
    image, ids, real = batch(n=4, t=5)
    history = []
    for _ in range(100):
        losses = stage(image, ids, real, generate_id=2, chance=chance)
        optimiser.zero_grad()
        losses.total.backward()
        optimiser.step()
        history.append(torch.stack((losses.contrast, losses.match, losses.generate)).detach())
    first, last = torch.stack(history[:5]).mean(0), torch.stack(history[-10:]).mean(0)
    assert (last < 0.8 * first).all(), (first, last)


def test_a_negative_is_never_a_pair_that_says_the_same() -> None:
    ids = torch.tensor([[1, 5], [1, 5], [1, 6], [1, 7]])
    same = same_text(ids, ids)
    chance = torch.Generator().manual_seed(0)
    scores = torch.tensor([[9.0, 9, 0, 0], [9, 9, 0, 0], [9, 0, 9, 0], [0, 0, 0, 9]])
    drawn = torch.stack([hard_negatives(scores, same, 0, chance) for _ in range(200)])
    assert not same[torch.arange(4), drawn].any()
    assert (drawn[:, 2] == 0).float().mean() > 0.9  # the nearest is drawn most often


def test_negatives_come_from_all_processes_and_each_knows_its_own_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two processes sees what one process with the whole batch sees in its own rows."""
    pictures, texts = torch.randn(4, QUERIES, 16), torch.randn(4, 16)
    whole = similarities(pictures, texts, torch.tensor(0.07))
    others = iter((pictures[:2], texts[:2]))
    monkeypatch.setattr(module.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(module.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(module, "all_gather", lambda mine: [next(others), mine])
    half = similarities(pictures[2:], texts[2:], torch.tensor(0.07))
    assert half[2] == 2
    assert torch.allclose(half[0], whole[0][2:]) and torch.allclose(half[1], whole[1][2:])


def test_a_batch_of_one_caption_is_told() -> None:
    ids = torch.tensor([[1, 5], [1, 5]])
    with pytest.raises(TrainingError, match="all 2 captions of a batch are alike"):
        hard_negatives(torch.zeros(2, 2), same_text(ids, ids), 0, torch.Generator())
    with pytest.raises(ConfigError, match="text half"):
        StageOne(LARGE)
