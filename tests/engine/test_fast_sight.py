"""The tower on a GPU is the tower: every kind of block, by the kernels that stand between its products."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.a_triton import DEVICE  # isort: skip
from engine.test_kernels import near, random
from tessella.config import VisionConfig
from tessella.engine.fast_sight import FastTower, embedded
from tessella.engine.kernels.sight import activate, norm_of, scale_add_norm
from tessella.model.layers import RMSNorm
from tessella.model.vision import VisionTower, quick_gelu

SMALL = VisionConfig(hidden_size=48, intermediate_size=96, num_layers=3, num_heads=2, image_size_px=28, patch_size_px=14)
KINDS = {
    "InternViT": (SMALL, -1),
    "InternViT-6B": (dataclasses.replace(SMALL, norm="rms_norm", qk_norm=True, qkv_bias=False), -1),
    "CLIP": (dataclasses.replace(SMALL, layer_scale=False, pre_norm=True, activation="quick_gelu", patch_bias=False), -2),
    "kept": (dataclasses.replace(SMALL, keep_class_token=True, post_norm="used"), 0),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [28, 42])  # the trained grid, and one that its positions are resized for
def test_every_kind_of_tower_sees_the_same(kind: str, side: int) -> None:
    torch.manual_seed(0)
    tower = VisionTower(*KINDS[kind]).to(DEVICE).eval()
    with torch.no_grad():
        for weight in tower.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    tiles = random(3, 3, side, side)
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):  # its convolution, the reference, would be rough
        torch.testing.assert_close(embedded(tower.embeddings, tiles), tower.embeddings(tiles), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(FastTower(tower)(tiles), tower(tiles), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [nn.LayerNorm(96, eps=1e-6), RMSNorm(96, 1e-6)])
def test_sum_scale_and_norm_are_those_of_torch(dtype: torch.dtype, norm: nn.Module) -> None:
    norm = norm.to(DEVICE, dtype)
    x, more, scale = 3 + random(5, 96, dtype=dtype), random(5, 97, dtype=dtype)[:, :-1].contiguous(), random(96, dtype=dtype)
    with torch.inference_mode():
        torch.testing.assert_close(norm_of(x, norm), norm(x), **near(dtype))
        for factor in (scale, None):
            summed, normed = scale_add_norm(x, more, factor, norm)
            expected = x + (more if factor is None else more * factor)
            torch.testing.assert_close(summed, expected, **near(dtype))
            torch.testing.assert_close(normed, norm(expected), **near(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_those_of_torch_also_far_out(dtype: torch.dtype) -> None:
    x = 4 * random(3, 1500, dtype=dtype)
    x[0, :2] = torch.tensor([80.0, -80.0])
    torch.testing.assert_close(activate(x.clone(), quick=False), F.gelu(x), **near(dtype))
    torch.testing.assert_close(activate(x.clone(), quick=True), quick_gelu(x), **near(dtype))


def test_every_number_of_tiles_is_looked_at_once_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the shapes and with the strides that the pictures will have."""
    seen: list[tuple[torch.Size, tuple[int, ...]]] = []
    attend = F.scaled_dot_product_attention

    def told(q: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        seen.append((q.shape, q.stride()))
        return attend(q, *others)

    monkeypatch.setattr(F, "scaled_dot_product_attention", told)
    tower = VisionTower(SMALL).to(DEVICE).eval()
    fast = FastTower(tower)
    with torch.inference_mode():
        fast.warm(4)
        before = set(seen)
        assert len(before) == 4
        for tiles in range(1, 5):
            fast(random(tiles, 3, 28, 28))
    assert set(seen) == before and len(seen) == 4 + 4 * SMALL.num_layers
