"""The Triton kernels do what torch's own operations do; without a GPU they run in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

from engine.a_triton import DEVICE  # isort: skip
from tessella.engine import kernels
from tessella.model.attend import one_row
from tessella.model.layers import RMSNorm, rotate


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


@pytest.mark.parametrize(("hq", "hk", "d"), [(4, 2, 24), (9, 3, 64), (16, 8, 128)])
@pytest.mark.parametrize("splits", [1, 4])
def test_decode_gives_the_last_row_of_plain_attention(
    hq: int, hk: int, d: int, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "splits_of", lambda programs: splits)
    lengths, block_tokens = [1, 64, 65, 200], 16
    widths = [-(-length // block_tokens) for length in lengths]
    order = torch.randperm(sum(widths)).split(widths)
    keys, values = (torch.zeros(sum(widths), hk, block_tokens, d, device=DEVICE) for _ in range(2))
    table = torch.full((4, max(widths) + 3), 10**6, dtype=torch.int32)[:, 1:]  # what lies behind a row is never read
    qs, oracle = [], []
    for row, (length, blocks) in enumerate(zip(lengths, order, strict=True)):
        q, k, v = random(length, hq, d), random(length, hk, d), 2 * random(length, hk, d)
        table[row, : len(blocks)] = blocks
        at = torch.arange(length)
        places = (blocks[at // block_tokens] * (hk * block_tokens) + at % block_tokens).to(DEVICE)
        kernels.put(k, v, places, keys, values)
        qs.append(q[-1])
        oracle.append(one_row(q, k, v)[-1])
    counts = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    out = kernels.decode(torch.stack(qs), keys, values, table.to(DEVICE), counts)
    torch.testing.assert_close(out, torch.stack(oracle), atol=1e-5, rtol=1e-4)


def test_few_rows_are_cut_into_many_stretches() -> None:
    assert [kernels.splits_of(programs) for programs in (8, 64, 256, 2048)] == [32, 8, 2, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_small_steps_are_those_of_torch(dtype: torch.dtype) -> None:
    near = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    norm = RMSNorm(96, 1e-5).to(DEVICE, dtype)
    norm.weight.data = random(96, dtype=dtype)
    x = random(5, 96, dtype=dtype)
    torch.testing.assert_close(kernels.rms_norm(x, norm.weight, norm.eps), norm(x), **near)
    gate, up = random(7, 300, dtype=dtype), random(300, 7, dtype=dtype).T
    torch.testing.assert_close(kernels.silu_times(gate, up), F.silu(gate) * up, **near)
    q, k, cosine, sine = (random(5, heads, 24, dtype=dtype) for heads in (4, 2, 1, 1))
    expected = rotate(q, cosine, sine), rotate(k, cosine, sine)
    kernels.rotate_in_place(q, k, cosine, sine)
    torch.testing.assert_close((q, k), expected, **near)
