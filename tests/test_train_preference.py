"""Preference tuning: the losses by their published formulas, pairs read from rows, and runs that come to prefer."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("peft", reason="teaching goes through PEFT, which is not installed: it is in the train extra")

from tessella.checkpoint.read import load
from tessella.errors import ConfigError, DataError
from tessella.train.dataset import read_dataset
from tessella.train.loop import train
from tessella.train.lora import prepare
from tessella.train.optimiser import Optimiser
from tessella.train.pairs import split_pair
from tessella.train.preference import PairSteps, Preference, bco, dpo
from tessella.train.recipe import Recipe
from test_train_loop import colour_samples, folder, interrupt_at, learned, recipe_of

__all__ = ["folder"]  # the fixture


def pairs(count: int = 6):  # type: ignore[no-untyped-def]
    return [replace(sample, rejected="a dish of rice") for sample in colour_samples(count)]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_losses_are_those_that_were_published() -> None:
    """TRL's dpo_trainer: -logsigmoid(beta * logits); -logsigmoid(beta * c - delta) - logsigmoid(-(beta * r - delta))."""
    beta, shift = 0.1, 0.03
    policy, reference = (-31.5, -40.25), (-33.0, -36.5)  # log probabilities of the chosen and the rejected answer
    logits = (policy[0] - policy[1]) - (reference[0] - reference[1])
    rewards = [torch.tensor(beta * (now - then), dtype=torch.float64) for now, then in zip(policy, reference, strict=True)]
    assert float(dpo(*rewards)) == pytest.approx(-math.log(sigmoid(beta * logits)), rel=1e-12)
    plain = -math.log(sigmoid(beta * (policy[0] - reference[0]) - shift))
    plain -= math.log(sigmoid(-(beta * (policy[1] - reference[1]) - shift)))
    assert float(bco(*rewards, torch.tensor(shift, dtype=torch.float64))) == pytest.approx(plain, rel=1e-12)


def step_of(folder: Path, recipe: Recipe, sums: tuple[float, float] = (0.0, 0.0)):  # type: ignore[no-untyped-def]
    """One step's loss and gradients, with B of the adapter moved away from zero, and its numbers by hand in float64."""
    torch.manual_seed(0)
    loaded = load(folder, device="cpu", dtype="float32")
    taught = prepare(loaded.model.train(), recipe)
    optimiser = Optimiser(taught, recipe, 10)
    passes = Preference(loaded.model, recipe, taught, optimiser)
    optimiser.sums.copy_(torch.tensor(sums))
    with torch.no_grad():
        for name, parameter in taught.parameters.items():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) / 20)
    data = PairSteps(pairs(3), loaded.inputs, looks=3, samples_per_step=3, tokens_per_pass=recipe.tokens_per_pass, seed=0)[0]
    total = torch.zeros(())
    for pack in data.packs:
        share = passes.share(pack, data)
        share.backward()
        total += share.detach()
    return float(total), {name: p.grad for name, p in taught.parameters.items()}, (passes, data)


@pytest.mark.parametrize("method", ["dpo", "mpo"])
def test_a_steps_loss_is_the_formula_row_by_row_and_no_split_changes_it(folder: Path, tmp_path: Path, method: str) -> None:
    recipe = recipe_of(folder, tmp_path, method=method)
    loss, gradients, (passes, data) = step_of(folder, recipe, sums=(6.0, 24.0))
    assert len(data.packs) == 1 and len(data.packs[0].lengths) == 6

    def log_probabilities() -> tuple[list[float], list[int]]:
        losses, rows = passes.token_losses(passes.learned(data.packs[0]), data.packs[0]), passes.row_of(data.packs[0])
        return [-float(losses[rows == row].double().sum()) for row in range(6)], [int((rows == row).sum()) for row in range(6)]

    with torch.no_grad():
        now, tokens = log_probabilities()
        with passes.reference():
            then, _ = log_probabilities()
    untouched = load(folder, device="cpu", dtype="float32")
    original = Preference(untouched.model, recipe, prepare(untouched.model, recipe), passes.optimiser)
    with torch.no_grad():  # the reference is the model as it came, its projector too
        losses, rows = original.token_losses(original.learned(data.packs[0]), data.packs[0]), original.row_of(data.packs[0])
    assert then == pytest.approx([-float(losses[rows == row].double().sum()) for row in range(6)], abs=1e-4)

    rewards = [0.1 * (a - b) for a, b in zip(now, then, strict=True)]
    chosen, rejected = rewards[::2], rewards[1::2]
    wanted = -sum(math.log(sigmoid(c - r)) for c, r in zip(chosen, rejected, strict=True)) / 3
    if method == "mpo":
        shift = 6.0 / 24.0
        quality = -sum(math.log(sigmoid(c - shift)) + math.log(sigmoid(shift - r)) for c, r in zip(chosen, rejected, strict=True))
        wanted = 0.8 * wanted + 0.2 * quality / 3 - sum(now[::2]) / sum(tokens[::2])
        assert passes.optimiser.pending.tolist() == pytest.approx([sum(rewards), 6], rel=1e-4, abs=1e-4)
    assert loss == pytest.approx(wanted, rel=1e-4)

    again, others, (_, data) = step_of(folder, replace(recipe, tokens_per_pass=100), sums=(6.0, 24.0))
    assert len(data.packs) > 1
    assert again == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_run_comes_to_prefer_what_was_chosen(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, tmp_path, method="dpo", epochs=6.0, beta=0.5)
    result = train(recipe, samples=pairs(4))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    assert steps[0]["loss"] == pytest.approx(math.log(2), rel=1e-4) and steps[0]["reward_margin"] == pytest.approx(0, abs=1e-4)
    assert steps[-1]["reward_accuracy"] == 1.0 and steps[-1]["reward_margin"] > 0.5
    assert result.losses[-1][1] < 0.5


def test_the_mix_is_resumed_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, tmp_path / "a", method="mpo", epochs=4.0, samples_per_step=2)
    straight = train(recipe, samples=pairs(2))
    stopped = replace(recipe, output=tmp_path / "b")
    train(stopped, samples=pairs(2), on_event=interrupt_at(2))
    rest = train(replace(stopped, resume=True), samples=pairs(2))
    assert rest.losses == straight.losses
    assert all(torch.equal(learned(rest)[name], value) for name, value in learned(straight).items())


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"question": "Which dish?", "chosen": "Ramen.", "rejected": "Soup."}, "Which dish?"),
        ({"prompt": "Which dish?", "chosen": "Ramen.", "rejected": "Soup."}, "Which dish?"),
        ({"messages": [{"role": "user", "content": "Which dish?"}], "chosen": "Ramen.", "rejected": "Soup."}, "Which dish?"),
        ({"conversations": [{"from": "human", "value": "Which dish?"}], "chosen": "Ramen.", "rejected": "Soup."}, "Which dish?"),
        (
            {
                "prompt": [{"role": "user", "content": "Which dish?"}],
                "chosen": [{"role": "assistant", "content": "Ramen."}],
                "rejected": [{"role": "assistant", "content": "Soup."}],
            },
            "Which dish?",
        ),
    ],
)
def test_pairs_are_read_under_each_name(row: dict[str, object], question: str, tmp_path: Path) -> None:
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"image": "a.png", **row}) + "\n")
    samples, _ = read_dataset(file)
    assert samples[0].question.endswith(question) and (samples[0].answer, samples[0].rejected) == ("Ramen.", "Soup.")
    assert len(samples[0].pictures) == 1


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "a", "chosen": "b", "rejected": "b"}, "equal answers"),
        ({"question": "a", "chosen": "b", "rejected": ""}, "empty answer"),
        ({"question": "a", "chosen": [], "rejected": "b"}, "empty answer"),
        ({"chosen": "b", "rejected": "c"}, "no question"),
    ],
)
def test_a_pair_that_says_nothing_is_refused(row: dict[str, object], words: str) -> None:
    with pytest.raises(DataError, match=words):
        split_pair(row)


def test_samples_that_are_no_pairs_and_ways_that_have_no_reference_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pairs, as made:0"):
        train(recipe_of(folder, tmp_path, method="dpo"), samples=colour_samples(4))
    with pytest.raises(ConfigError, match="further on_top"):
        Recipe(method="dpo", further="same")
    with pytest.raises(ConfigError, match="mpo_weights"):
        Recipe(method="mpo", mpo_weights=(0.0, 0.0, 0.0))
