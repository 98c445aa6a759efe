"""Packing: a plan from lengths alone, and the same gradients whatever it is."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("peft", reason="teaching goes through PEFT, which is not installed: it is in the train extra")

from tessella.chat import Message
from tessella.inputs import Inputs, Picture
from tessella.tokenizer import Tokenizer
from tessella.train.batch import Pack, Steps, pack, pack_all
from tessella.train.dataset import Sample
from tessella.train.packing import grouped, plan_epoch, plan_passes, rope_limit
from tessella.train.passes import Passes
from tessella.train.recipe import Recipe
from tiny import LONG_ROPE, tiny_config, tiny_folder, tiny_model

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40)


@pytest.fixture(scope="module", params=["LlamaForCausalLM", "Phi3ForCausalLM", "InternLM2ForCausalLM"])
def inputs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tiny_folder(tmp_path_factory.mktemp("base") / "tiny", request.param)
    return Inputs(tiny_config(request.param), Tokenizer.load(folder))


def samples_of(inputs: Inputs, count: int = 9) -> list[Sample]:
    """Rows of many lengths, with no picture, one, or two; some longer than the tiny Phi-3's short angles reach."""
    samples = []
    for n in range(count):
        pictures = tuple(Picture(Image.new("RGB", (56 * (1 + n % 2), 56), (25 * n, 20 * k, 90))) for k in range(n % 3))
        text = "<image>\n" * len(pictures) + "What is the name? " * (1 + 14 * (n % 4 == 3))
        messages = (Message("user", text.strip()), Message("assistant", "red apple " * (1 + n % 3)))
        sizes = tuple(picture.source.size for picture in pictures)  # type: ignore[union-attr]
        measured = inputs.lengths(messages, sizes, open_turn=False)
        samples.append(Sample(f"row:{n}", messages, pictures, f"key{n}", (), "", *measured))
    return samples


@given(LENGTHS, st.integers(64, 500), st.sampled_from(["best_fit", "in_order"]), st.none() | st.integers(20, 300))
def test_every_row_is_in_one_pass_whole_and_no_pass_is_too_full(
    lengths: list[int], most: int, how: str, limit: int | None
) -> None:
    passes = plan_passes(lengths, most, packing=how, alone_over=limit)
    assert sorted(row for one in passes for row in one) == list(range(len(lengths)))
    assert all(len(one) == 1 or sum(lengths[row] for row in one) <= most for one in passes)
    assert all(len(one) == 1 for one in passes if limit is not None and max(lengths[row] for row in one) > limit)
    assert passes == plan_passes(lengths, most, packing=how, alone_over=limit)


@given(LENGTHS, st.integers(300, 900))
def test_best_fit_needs_no_more_passes_than_order_and_stays_near_the_bound(lengths: list[int], most: int) -> None:
    best = len(plan_passes(lengths, most, packing="best_fit"))
    assert best <= len(plan_passes(lengths, most))
    assert best <= 11 / 9 * max(1, -(-sum(lengths) // most)) + 2


@settings(max_examples=30)
@given(st.integers(1, 400), st.integers(1, 16), st.integers(0, 99))
def test_a_grouped_order_holds_each_row_once_in_steps_of_one_length(count: int, per_step: int, seed: int) -> None:
    lengths = [10 + (37 * n) % 211 for n in range(count)]
    order = grouped(range(count), lengths, per_step, seed)
    assert sorted(order) == list(range(count))
    plain = plan_epoch(lengths, range(count), per_step, 512, "best_fit", None)
    sorted_ = plan_epoch(lengths, order, per_step, 512, "grouped", None)
    assert sorted_.padding_saved <= plain.padding_saved + 1e-9
    assert sum(map(sorted_.tokens_of, sorted_.passes)) == sum(lengths)


def gradients(inputs: Inputs, packs: list[list[Pack]]) -> dict[str, torch.Tensor]:
    """packs: for each round of accumulation its passes; the loss is one mean over all learned tokens of the step."""
    model = tiny_model(inputs.config)
    passes = Passes(model, Recipe(tower="full", language="full"))
    learned = sum(len(one.targets) for round_ in packs for one in round_)
    for round_ in packs:
        for one in round_:
            (passes.loss(one) / learned).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_the_same_for_every_split_into_packs_and_accumulation_steps(inputs: Inputs) -> None:
    samples = samples_of(inputs, 6)
    rows = [inputs.build(s.messages, s.pictures, open_turn=False) for s in samples]
    limit = rope_limit(inputs.config.language)
    alone = gradients(inputs, [[pack([row])] for row in rows])
    scale = max(1.0, *(float(g.abs().max()) for g in alone.values()))
    splits = [[pack_all(rows, most, packing=how, alone_over=limit)] for how, most in (("best_fit", 400), ("in_order", 4096))]
    splits.append([pack_all(part, 300, packing="best_fit", alone_over=limit) for part in (rows[4:], rows[:1], rows[1:4])])
    assert any(len(one) < 6 for split in splits for one in split)  # rows do share passes
    for split in splits:
        other = gradients(inputs, split)
        assert other.keys() == alone.keys()
        worst = max(float((alone[name] - other[name]).abs().max()) for name in alone)
        assert worst < 1e-6 * scale, worst


def test_a_long_row_of_phi3_does_not_turn_its_neighbours(tmp_path: Path) -> None:
    config = tiny_config("Phi3ForCausalLM")
    inputs = Inputs(config, Tokenizer.load(tiny_folder(tmp_path / "phi", "Phi3ForCausalLM")))
    samples = samples_of(inputs)
    assert any(s.tokens > LONG_ROPE.original_positions for s in samples)
    assert any(s.tokens <= LONG_ROPE.original_positions for s in samples)
    rows = [inputs.build(s.messages, s.pictures, open_turn=False) for s in samples]
    passes = Passes(tiny_model(config), Recipe(tower="full"))
    with torch.no_grad():
        alone = sum(float(passes.loss(pack([row]))) for row in rows)
        packs = pack_all(rows, 4096, packing="best_fit", alone_over=rope_limit(config.language))
        together = sum(float(passes.loss(one)) for one in packs)
        careless = sum(float(passes.loss(one)) for one in pack_all(rows, 4096))
    assert abs(together - alone) < 1e-3
    assert abs(careless - alone) > 0.1  # what the rule is for


@pytest.mark.parametrize("packing", ["best_fit", "in_order", "grouped"])
def test_steps_make_the_passes_that_were_planned_from_headers(inputs: Inputs, packing: str) -> None:
    samples = samples_of(inputs, 14)
    steps = Steps(samples, inputs, looks=14, samples_per_step=4, tokens_per_pass=500, seed=2, packing=packing)
    plan = steps.plan(0)
    for number, planned in enumerate(plan.steps):
        made = [one.lengths for one in steps[number].packs]
        assert made == [tuple(plan.lengths[row] for row in rows) for rows in planned]
    tiles = sum(len(one.tiles) for number in range(4) for one in steps[number].packs)
    slots = sum(len(one.slots) for number in range(4) for one in steps[number].packs)
    assert tiles == sum(sample.tiles for sample in samples)
    assert slots == 4 * tiles  # no image token is ever cut
