"""Packing, order, and the loss: a split into passes changes nothing."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("peft", reason="teaching goes through PEFT, which is not installed: it is in the train extra")

from tessella.chat import Message
from tessella.checkpoint.read import load
from tessella.errors import ConfigError
from tessella.generate import all_logits
from tessella.inputs import Inputs, ModelInput, Picture
from tessella.model.attend import Causal, one_row
from tessella.tokenizer import Tokenizer
from tessella.train.batch import Steps, order_of, pack, pack_all
from tessella.train.dataset import Sample
from tessella.train.features import Kept, chosen
from tessella.train.lora import prepare
from tessella.train.packing import plan_passes
from tessella.train.passes import Passes
from tessella.train.recipe import Recipe
from tiny import tiny_config, tiny_folder, tiny_model


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tiny_folder(tmp_path_factory.mktemp("base") / "tiny", "LlamaForCausalLM")
    return Inputs(tiny_config("LlamaForCausalLM"), Tokenizer.load(folder))


def rows_of(inputs: Inputs, count: int = 7) -> list[ModelInput]:
    """Rows of several lengths, with one picture, two, or none."""
    rows = []
    for i in range(count):
        pictures = [Picture(Image.new("RGB", (56, 56), (30 * i, 20 * n, 90))) for n in range(i % 3)]
        text = "<image>\n" * len(pictures) + "What is the name? " * (1 + i % 4)
        messages = [Message("user", text), Message("assistant", "red apple " * (1 + i % 3))]
        rows.append(inputs.build(messages, pictures, open_turn=False))
    return rows


def gradients(inputs: Inputs, tokens_per_pass: int) -> dict[str, torch.Tensor]:
    model = tiny_model(inputs.config)
    passes = Passes(model, Recipe(tower="full", language="full"))
    packs = pack_all(rows_of(inputs), tokens_per_pass)
    learned = sum(len(one.targets) for one in packs)
    for one in packs:
        (passes.loss(one) / learned).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tokens_per_pass", [1, 60, 130])
def test_gradients_are_the_same_however_a_step_is_split(inputs: Inputs, tokens_per_pass: int) -> None:
    whole, split = gradients(inputs, 10_000), gradients(inputs, tokens_per_pass)
    assert whole.keys() == split.keys()
    scale = max(float(g.abs().max()) for g in whole.values())
    for name, gradient in whole.items():
        assert float((gradient - split[name]).abs().max()) < 1e-6 * max(1.0, scale), name


def test_the_loss_is_that_of_each_row_alone_over_all_its_logits(inputs: Inputs) -> None:
    model, rows = tiny_model(inputs.config), rows_of(inputs)
    with torch.no_grad():
        packed = Passes(model, Recipe(tower="full")).loss(pack(rows))
    alone = torch.zeros(())
    for row in rows:
        logits = all_logits(model, row)[:-1]
        wanted = torch.where(row.learn[1:], row.ids[1:], -100)
        alone += torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-4)


def test_logits_are_made_only_where_the_next_token_is_learned(inputs: Inputs) -> None:
    rows = rows_of(inputs)
    one = pack(rows)
    assert len(one.targets) == sum(int(row.learn.sum()) for row in rows)
    assert torch.equal(one.ids[one.predict + 1], one.targets)
    learn = torch.cat([row.learn for row in rows])
    assert bool(learn[one.predict + 1].all())


def test_the_last_token_of_a_row_predicts_nothing_of_its_neighbour(inputs: Inputs) -> None:
    row = inputs.build([Message("user", "What?"), Message("assistant", "red")], open_turn=False)
    learning_first = ModelInput(
        row.ids, torch.ones_like(row.learn), row.slots, row.tiles, row.tiles_per_picture, row.digests
    )  # its first token learns too: a neighbour in front must not predict it
    one = pack([row, learning_first])
    assert len(row) - 1 not in one.predict.tolist()
    assert len(one.targets) == int(row.learn.sum()) + len(row) - 1


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(64, 500))
def test_passes_hold_every_row_once_in_order_and_no_more_than_fit(lengths: list[int], most: int) -> None:
    passes = plan_passes(lengths, most)
    assert [row for one in passes for row in one] == list(range(len(lengths)))
    assert all(len(one) == 1 or sum(lengths[row] for row in one) <= most for one in passes)
    for one, after in pairwise(passes):
        assert sum(lengths[row] for row in one) + lengths[after[0]] > most  # no pass ends early


@given(st.integers(1, 200), st.integers(0, 2**32 - 1), st.integers(0, 50))
def test_an_epoch_shows_each_sample_once_in_an_order_of_its_own(count: int, seed: int, epoch: int) -> None:
    order = order_of(count, seed, epoch)
    assert sorted(order) == list(range(count))
    assert order == order_of(count, seed, epoch)
    if count > 20:
        assert order != order_of(count, seed, epoch + 1) and order != order_of(count, seed + 1, epoch)


def samples_of(count: int) -> list[Sample]:
    picture = Picture(Image.new("RGB", (64, 48), (200, 30, 60)))
    messages = (Message("user", "<image>\nWhat?"), Message("assistant", "red"))
    return [Sample(f"row:{i}", messages, (picture,), f"key{i}") for i in range(count)]


def test_epochs_follow_without_a_seam_and_only_the_last_step_is_short(inputs: Inputs) -> None:
    steps = Steps(samples_of(5), inputs, looks=12, samples_per_step=4, tokens_per_pass=4096, seed=3)
    places = [steps[i].places for i in range(len(steps))]
    assert [len(some) for some in places] == [4, 4, 4]
    flat = [place for some in places for place in some]
    assert sorted(flat[:5]) == sorted(flat[5:10]) == [f"row:{i}" for i in range(5)]
    short = Steps(samples_of(5), inputs, looks=9, samples_per_step=4, tokens_per_pass=64, seed=0)
    assert [len(short[i].places) for i in range(len(short))] == [4, 4, 1]


def test_a_step_is_the_same_whoever_makes_it_and_augmented_looks_differ(inputs: Inputs) -> None:
    def made(step: int) -> tuple[str, ...]:
        picture = Image.linear_gradient("L").convert("RGB").resize((64, 64))
        samples = [Sample("row:0", samples_of(1)[0].messages, (Picture(picture),), "key")]
        steps = Steps(samples, inputs, looks=4, samples_per_step=1, tokens_per_pass=512, seed=1, augmentation="light")
        return steps[step].packs[0].digests

    assert made(2) == made(2)
    assert len({made(step) for step in range(4)}) == 4


def test_a_feature_is_the_same_in_company_and_kept_within_its_bytes() -> None:
    calls: list[list[int]] = []
    tiles = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 3, 2, 2)

    def compute(places: list[int]) -> torch.Tensor:
        calls.append(places)
        return chosen(tiles, places).float().mean(dim=(2, 3))

    kept = Kept(torch.device("cpu"), max_bytes=2 * 3 * 4)
    first = kept(["a", "b", "a", "c"], compute)
    assert calls == [[2], [1], [3]] and kept.num_bytes == 24  # "a" once, each tile alone; "c" finds no room
    again = kept(["a", "b", "a", "c"], compute)
    assert calls == [[2], [1], [3], [3]] and torch.equal(torch.stack(first), torch.stack(again))


def test_a_row_of_a_pack_is_the_row_packed_alone(inputs: Inputs) -> None:
    rows = rows_of(inputs)
    together = pack(rows)
    for index, row in enumerate(rows):
        one, alone = together.row(index), pack([row])
        assert (one.lengths, one.digests, one.keys, one.tiles_of) == (alone.lengths, alone.digests, alone.keys, alone.tiles_of)
        assert all(torch.equal(getattr(one, name), getattr(alone, name)) for name in ("ids", "slots", "positions", "tiles"))
    assert len({*together.keys}) == len(rows)


def test_layers_below_the_first_that_learns_are_run_once_and_change_no_gradient(inputs: Inputs) -> None:
    packed, found = pack(rows_of(inputs)), []
    for cache in (True, False):
        torch.manual_seed(0)
        model = tiny_model(inputs.config)
        recipe = Recipe(projector="frozen", lora_layers=1, lora_dropout=0.0, cache_features=cache)
        names = prepare(model, recipe).parameters
        passes = Passes(model, recipe)
        for parameter in names.values():  # B begins at zero, and then A has no gradient
            parameter.data = torch.randn_like(parameter)
        losses = [passes.loss(packed) for _ in range(2)]
        sum(losses).backward()
        found.append((losses, {name: parameter.grad for name, parameter in names.items()}))
        assert passes.rows.computed == (len(packed.lengths) if cache else 2 * len(packed.lengths))
    (kept, kept_gradients), (anew, gradients) = found
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[1], anew[1])
    assert gradients and all(
        ".layers.1." in name and torch.equal(kept_gradients[name], value) for name, value in gradients.items()
    )


def test_the_loss_is_the_same_when_the_layers_below_are_kept(inputs: Inputs) -> None:
    packed, model = pack(rows_of(inputs)), tiny_model(inputs.config)
    whole = Passes(model, Recipe(projector="frozen")).loss(packed)
    parted = Passes(model, Recipe(projector="frozen", lora_layers=1)).loss(packed)
    torch.testing.assert_close(parted, whole, rtol=1e-5, atol=1e-5)


def test_more_lora_layers_than_there_are_is_refused(inputs: Inputs) -> None:
    with pytest.raises(ConfigError, match="lora_layers is 3, but the language model has 2 layers"):
        prepare(tiny_model(inputs.config), Recipe(lora_layers=3))


@settings(deadline=None, max_examples=40)  # the machine may be busy
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.sampled_from([1, 3]), st.booleans())
def test_blocks_give_what_each_row_alone_gives_forward_and_backward(lengths: list[int], shared: int, long_rows: bool) -> None:
    lengths = [*lengths, 530] if long_rows else lengths
    total = sum(lengths)
    q, k, v = (torch.randn(total, heads, 8, requires_grad=True) for heads in (2 * shared, 2, 2))
    grad = torch.randn(total, 2 * shared, 8)
    blocks = Causal(lengths)(0, q, k, v)
    alone = torch.cat([one_row(*row) for row in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)])
    torch.testing.assert_close(blocks, alone, rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad(out, (q, k, v), grad) for out in (blocks, alone))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_load_gives_inputs_that_pack(inputs: Inputs, tmp_path: Path) -> None:
    loaded = load(tiny_folder(tmp_path / "tiny", "InternLM2ForCausalLM"), device="cpu", dtype="float32")
    rows = rows_of(loaded.inputs, 3)
    assert pack(rows).lengths == tuple(len(row) for row in rows)
