"""Is the proof of a merge fair? What rounding alone does passes, however faint the adapter; anything beyond it does not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from taught import ALPHA, RANK
from tessella.checkpoint.adapters import AdapterSettings, save_adapter
from tessella.checkpoint.convert import Wish, convert
from tessella.checkpoint.proof import Proofs, prove
from tessella.checkpoint.read import load_model
from tessella.checkpoint.source import open_source, shaken
from tessella.checkpoint.verify import LIMITS, compare

LLAMA = "LlamaForCausalLM"
LEFT_OUT = "language_model.model.layers.1.mlp.down_proj"


def two_steps(base: Path) -> dict[str, Tensor]:
    """A LoRA after two steps of Adam at 1e-3: B has moved by 0.002 at most, A is as PEFT begins it."""
    chance = torch.Generator().manual_seed(3)
    state = {}
    for name, weight in load_model(base)[0].named_parameters():
        if name.startswith("language_model.model.layers") and name.endswith("proj.weight"):
            module, inputs = name.removesuffix(".weight"), weight.shape[1]
            state[f"{module}.lora_A.weight"] = (2 * torch.rand(RANK, inputs, generator=chance) - 1) / inputs**0.5
            state[f"{module}.lora_B.weight"] = 2e-3 * torch.randint(-1, 2, (weight.shape[0], RANK), generator=chance)
    return state


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.tiny_folder(tmp_path / "base", LLAMA, dtype=torch.bfloat16)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter", two_steps(base), AdapterSettings(str(base), RANK, ALPHA))


def proved(adapter: Path, other: Path) -> Proofs:
    return prove(open_source(adapter), open_source(other), mode="logits")


def test_a_lora_of_two_steps_passes_and_is_told_what_rounding_keeps(adapter: Path, tmp_path: Path) -> None:
    result = convert(adapter, tmp_path / "out")
    tensors, logits = result.proof.tensors, result.proof.logits
    assert logits is not None and logits.effect_rms is not None and logits.effect_rms < 0.01  # of a spread of 1
    assert tensors.kept is not None and 0.8 < tensors.kept < 0.99 and "rounding keeps" in str(tensors)
    assert 0 < logits.difference_rms < logits.limit < LIMITS[torch.bfloat16] / 3  # the limit that was measured is the closer one
    wide = convert(adapter, tmp_path / "wide", Wish(dtype="float32"))
    assert wide.proof.tensors.kept == pytest.approx(1, abs=1e-4) and "rounding keeps" not in str(wide.proof.tensors)


def test_a_left_out_layer_of_it_does_not(base: Path, adapter: Path, tmp_path: Path) -> None:
    rest = {name: tensor for name, tensor in two_steps(base).items() if not name.startswith(LEFT_OUT)}
    save_adapter(tmp_path / "rest", rest, AdapterSettings(str(base), RANK, ALPHA))
    found = proved(adapter, convert(tmp_path / "rest", tmp_path / "out").folder)
    assert not found.holds and len(found.tensors.differing) == 1
    assert f"{LEFT_OUT}.weight" in found.tensors.differing[0] and "as if the adapter had been left out" in str(found.tensors)


def test_twice_the_alpha_of_it_does_not(base: Path, adapter: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "twice", two_steps(base), AdapterSettings(str(base), RANK, 2 * ALPHA))
    found = proved(adapter, convert(tmp_path / "twice", tmp_path / "out").folder)
    assert not found.holds and len(found.tensors.differing) == 14 and "it moved 2 times as far" in str(found.tensors)
    assert found.logits is not None and found.logits.effect_rms is not None


def test_a_number_beside_the_nearest_is_found(adapter: Path, tmp_path: Path) -> None:
    out = convert(adapter, tmp_path / "out").folder
    state = load_file(out / "model.safetensors")
    state[f"{LEFT_OUT}.weight"].view(torch.int16)[3, 5] += 1  # the next number of its type
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    found = proved(adapter, out)
    assert not found.holds and "are not the nearest" in found.tensors.differing[0]


def test_a_merge_into_another_type_is_rounded_once(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = convert(adapter, tmp_path / "out", Wish(dtype="float16")).folder
    was, now, pairs = load_file(base / "model.safetensors"), load_file(out / "model.safetensors"), two_steps(base)
    a, b = (pairs[f"{LEFT_OUT}.lora_{side}.weight"] for side in "AB")
    exact = was[f"{LEFT_OUT}.weight"].double() + ALPHA / RANK * (b.double() @ a.double())
    # float32 sums leave a few middles open; rounded to the base's bfloat16 first, seven of eight numbers would differ
    assert float((now[f"{LEFT_OUT}.weight"] != exact.half()).float().mean()) < 0.01


@pytest.mark.parametrize(("factor", "holds"), [(1.0, True), (1.3, True), (2.0, False)])
def test_logits_may_differ_hardly_more_than_rounding_makes_them(factor: float, holds: bool) -> None:
    chance = torch.Generator().manual_seed(0)
    logits, one, other = (torch.randn(50, 400, generator=chance) for _ in range(3))
    found = compare([logits], [logits + factor * 0.01 * other], torch.bfloat16, shaken=[logits + 0.01 * one])
    assert found.holds is holds
    assert found.largest_difference < LIMITS[torch.bfloat16]  # by the type alone each of them would pass


def test_shaking_moves_weights_as_rounding_does() -> None:
    weight = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    moved = shaken(weight, torch.bfloat16, torch.Generator().manual_seed(1)) - weight
    rounded = weight.bfloat16().float() - weight
    assert moved.square().mean() == pytest.approx(float(rounded.square().mean()), rel=0.05)
    assert bool((moved.abs() <= 2**-8 * weight.abs()).all())


def test_a_shift_that_all_logits_of_a_token_share_neither_refuses_nor_excuses() -> None:
    """Rounding moves them together by chance, and no answer depends on it."""
    chance = torch.Generator().manual_seed(0)
    logits, one, other = (torch.randn(50, 400, generator=chance) for _ in range(3))
    shift = 0.1 * torch.randn(50, 1, generator=chance)
    plainly = [logits + 0.01 * one]
    assert compare([logits], [logits + 0.01 * other + shift], torch.bfloat16, shaken=plainly).holds
    assert not compare([logits], [logits + 0.02 * other], torch.bfloat16, shaken=[logits + 0.01 * one + shift]).holds
