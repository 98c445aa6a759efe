"""QLoRA: four bits by their definition, gradients for the adapter alone, and an adapter that works on the base as it was."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="teaching goes through PEFT, which is not installed: it is in the train extra")

from tessella.checkpoint.adapters import read_adapter
from tessella.checkpoint.convert import Wish, convert
from tessella.checkpoint.read import load
from tessella.errors import ConfigError
from tessella.train.begin import load_to_teach
from tessella.train.held_out import HeldOut
from tessella.train.limits import Stop
from tessella.train.loop import train
from tessella.train.lora import prepare
from tessella.train.nf4 import BLOCK, CODE, Nf4Linear, dequantise, quantise
from tessella.train.passes import Passes
from tessella.train.recipe import Recipe
from test_train_loop import colour_samples, folder, recipe_of

__all__ = ["folder"]  # the fixture


def test_the_sixteen_values_are_the_quantiles_that_the_paper_defines() -> None:
    """Eight steps up to 1 and seven down to -1 between normal quantiles, zero exactly (arXiv:2305.14314, appendix E)."""
    offset = 0.9677083
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    up = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    down = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat((down, torch.zeros(1, dtype=torch.float64), up)).sort().values
    torch.testing.assert_close(torch.tensor(CODE, dtype=torch.float64), values / values.max(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_number_is_the_nearest_value_times_its_blocks_scale(dtype: torch.dtype) -> None:
    weight = (torch.randn(40, 96, generator=torch.Generator().manual_seed(0)) / 20).to(dtype)
    packed = quantise(weight)
    back = dequantise(packed, torch.float32)
    plain = weight.float().view(-1, BLOCK)
    scales = plain.abs().amax(1, keepdim=True)
    nearest = (plain / scales)[..., None].sub(torch.tensor(CODE)).abs().argmin(-1)
    wanted = torch.tensor(CODE)[nearest] * scales
    # An 8-bit float has three bits behind the point, and says how far a scale is from the mean of all: 1/16 of that at most.
    slack = float((scales - scales.mean()).abs().max()) / 16
    torch.testing.assert_close(back.view(-1, BLOCK), wanted, rtol=0, atol=slack)
    assert float((back - weight.float()).square().mean().sqrt()) < 0.1 * float(weight.float().std())


def test_four_bits_and_an_eighth_a_number() -> None:
    packed = quantise(torch.randn(512, 1024))
    assert packed.num_bytes * 8 / (512 * 1024) == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)


@pytest.mark.parametrize("shape", [(3, 5), (1, 64), (7, 33)])
def test_shapes_that_are_no_whole_blocks_and_blocks_of_zeros(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    weight[0] = 0
    back = dequantise(quantise(weight), torch.float32)
    assert back.shape == weight.shape and back.isfinite().all() and not back[0].any()


def test_gradients_flow_through_four_bits_to_the_adapter_alone(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, tmp_path, quantise=("language", "tower"), tower="lora", projector="frozen")
    loaded, _ = load_to_teach(recipe)
    taught = prepare(loaded.model, recipe)
    layer = loaded.model.language_model.model.layers[0].mlp.up_proj
    assert isinstance(layer.base_layer, Nf4Linear) and not isinstance(loaded.model.language_model.lm_head, Nf4Linear)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(5, 64, requires_grad=True)
    y = layer(x)
    weight = layer.base_layer.weight + 8.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(y, x @ weight.T, rtol=1e-4, atol=1e-4)
    found = torch.autograd.grad(y.square().sum(), (x, layer.lora_A["default"].weight))
    wanted = torch.autograd.grad((x @ weight.T).square().sum(), (x, layer.lora_A["default"].weight))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
    assert {name for name, p in loaded.model.named_parameters() if p.requires_grad} and all(
        ".lora_" in n for n in taught.parameters
    )


def test_what_four_bits_taught_answers_on_the_base_as_it_was(folder: Path, tmp_path: Path) -> None:
    samples = colour_samples()
    recipe = recipe_of(folder, tmp_path / "run", quantise=("language",), epochs=3.0)
    result = train(recipe, samples=samples, held_out=samples[:4])
    assert result.losses[-1][1] < 0.8 * result.losses[0][1]
    again = load(result.adapter, device="cpu", dtype="float32")  # the adapter on the base in full
    assert again.folder == folder
    loss = HeldOut(samples[:4], again, Passes(again.model, recipe), recipe).loss(Stop(None, 0.0))
    assert loss == pytest.approx(result.held_out_losses[-1][1], rel=0.2)
    done = convert(result.adapter, tmp_path / "merged", Wish(to="official"))
    assert "unquantised base" in done.about and done.as_json()["taught_in_4_bits"] == ["language"]
    kept = convert(result.adapter, tmp_path / "kept", Wish(to="adapter", names="official"))
    assert read_adapter(kept.folder).quantised == ("language",)


def test_a_part_that_learns_whole_cannot_be_in_four_bits() -> None:
    with pytest.raises(ConfigError, match="taught whole"):
        Recipe(language="full", quantise=("language",))
    with pytest.raises(ConfigError, match="quantise"):
        Recipe(quantise=("projector",))
