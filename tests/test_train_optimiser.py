"""LoRA, masters, schedule and clipping."""

import math

import pytest
import torch

pytest.importorskip("peft", reason="teaching goes through PEFT, which is not installed: it is in the train extra")

from peft.tuners.lora import Linear as PeftLinear

from tessella.train.lora import LoraLinear, prepare
from tessella.train.optimiser import Optimiser, learning_rate_factor
from tessella.train.recipe import Recipe
from tiny import tiny_config, tiny_model


def taught_model(dtype: torch.dtype = torch.float32, **changes: object):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = tiny_model(tiny_config("Qwen2ForCausalLM")).to(dtype)  # with biases on q, k and v
    recipe = Recipe(**{"lora_rank": 4, "lora_alpha": 6.0, "lora_dropout": 0.0, "learning_rate": 1e-2, **changes})
    return model, recipe, prepare(model, recipe)


@pytest.mark.parametrize("shape", [(11, 64), (2, 5, 64)])
def test_our_lora_layer_equals_pefts_own(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = taught_model()
    layer = model.language_model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, LoraLinear) and layer.base_layer.bias is not None
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(shape, requires_grad=True)
    parameters = (x, layer.lora_A["default"].weight, layer.lora_B["default"].weight)

    def run(forward) -> tuple[torch.Tensor, ...]:  # type: ignore[no-untyped-def]
        y = forward(layer, x)
        return (y, *torch.autograd.grad(y.square().sum(), parameters))

    torch.testing.assert_close(run(LoraLinear.forward), run(PeftLinear.forward), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), PeftLinear.forward(layer, x), rtol=1e-5, atol=1e-5)


def test_the_head_never_gets_lora() -> None:
    model, _, taught = taught_model(lora_targets=("q_proj", "down_proj"))
    assert not isinstance(model.language_model.lm_head, LoraLinear)
    assert all(".q_proj." in n or ".down_proj." in n for n in taught.parameters if ".lora_" in n)


def test_frozen_parameters_ask_for_no_gradient() -> None:
    model, _, taught = taught_model(projector="frozen")
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(learning) == len(taught.parameters) == 2 * 2 * 7
    assert all("lora_" in name for name in learning)


def test_each_part_has_its_own_rate_and_only_matrices_decay() -> None:
    _, recipe, taught = taught_model(
        tower="full", learning_rate=1e-3, tower_learning_rate=1e-4, projector_learning_rate=5e-4, weight_decay=0.1
    )
    optimiser = Optimiser(taught, recipe, 10)
    seen = {}
    for group in optimiser.adamw.param_groups:
        for parameter in group["params"]:
            name = next(n for n, master in optimiser.masters.items() if master is parameter)
            seen[name] = (group["lr"], group["weight_decay"])
    assert len(seen) == len(taught.parameters)
    assert seen["vision_model.encoder.layers.0.attn.qkv.weight"] == (1e-4, 0.1)
    assert seen["vision_model.encoder.layers.0.attn.qkv.bias"] == (1e-4, 0.0)
    assert seen["vision_model.encoder.layers.0.ls1"] == (1e-4, 0.0)
    assert seen["vision_model.embeddings.position_embedding"] == (1e-4, 0.0)
    assert seen["mlp1.0.weight"] == (5e-4, 0.0)
    assert seen["language_model.model.layers.0.mlp.up_proj.lora_A.weight"] == (1e-3, 0.1)


def test_the_rate_rises_then_falls_as_a_cosine() -> None:
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == sorted(factors[:10]) and factors[0] == pytest.approx(1 / 11)
    assert factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[55] == pytest.approx(0.5) and 0 < factors[99] < 1e-3
    assert learning_rate_factor(0, 1, 0.03) == 1.0


def test_gradients_are_clipped_to_the_norm_that_is_given_back() -> None:
    _, recipe, taught = taught_model(max_grad_norm=0.5, weight_decay=0.0)
    optimiser = Optimiser(taught, recipe, 10)
    seen: list[float] = []
    plain = optimiser.adamw.step
    optimiser.adamw.step = lambda: (seen.append(total(optimiser.masters)), plain())  # type: ignore[assignment]
    for parameter in taught.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimiser.accumulate()
    norm = optimiser.step(0)
    assert float(norm) == pytest.approx(math.sqrt(taught.count()), rel=1e-5)
    assert seen[0] == pytest.approx(0.5, rel=1e-4)


def total(masters: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(m.grad.square().sum()) for m in masters.values() if m.grad is not None))


def test_bfloat16_parameters_follow_float32_masters() -> None:
    """Steps far below bfloat16's resolution add up, and gradients of many passes are summed without loss."""
    _, recipe, taught = taught_model(torch.bfloat16, learning_rate=1e-5, warmup_share=0.0, weight_decay=0.0)
    optimiser = Optimiser(taught, recipe, 1000)
    name = "mlp1.1.weight"
    parameter, start = taught.parameters[name], optimiser.masters[name].detach().clone()
    assert parameter.dtype == torch.bfloat16
    for step in range(20):
        parameter.grad = torch.ones_like(parameter)
        optimiser.accumulate()
        optimiser.step(step)
    moved = start - optimiser.masters[name].detach()
    torch.testing.assert_close(moved, torch.full_like(moved, 20e-5), rtol=0.02, atol=1e-6)
    assert torch.equal(parameter, optimiser.masters[name].bfloat16())
    for value in (256.0, 1.0, 1.0, 1.0):  # 256 + 1 is 256 in bfloat16
        parameter.grad = torch.full_like(parameter, value)
        optimiser.accumulate()
    assert float(optimiser.masters[name].grad.max()) == 259.0


def test_state_and_restore_give_the_same_next_step() -> None:
    def run(stop_after: int | None) -> dict[str, torch.Tensor]:
        _, recipe, taught = taught_model()
        optimiser = Optimiser(taught, recipe, 6)
        for step in range(6):
            if step == stop_after:
                state = {name: value.clone() for name, value in optimiser.state().items()}
                _, recipe, taught = taught_model()
                optimiser = Optimiser(taught, recipe, 6)
                optimiser.restore(state)
            chance = torch.Generator().manual_seed(step)
            for parameter in taught.parameters.values():
                parameter.grad = torch.randn(parameter.shape, generator=chance)
            optimiser.accumulate()
            optimiser.step(step)
        return optimiser.values()

    straight, resumed = run(None), run(3)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
