"""The Triton kernels do what torch's own operations do; without a GPU they run in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.a_triton import DEVICE  # isort: skip
from tessella.engine.draw import likeliest
from tessella.engine.kernels import attend, prompts, steps
from tessella.engine.kernels.attend import HeadNorms, Heads, Turn
from tessella.engine.kernels.products import product
from tessella.engine.kernels.prompts import Plan, look_back, planned
from tessella.model.attend import one_row
from tessella.model.layers import RMSNorm, rotate

BLOCK = 16


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def near(dtype: torch.dtype) -> dict[str, float]:
    return {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}


def some_norms(d: int, normed: bool) -> HeadNorms | None:
    return HeadNorms(1 + 0.3 * random(d), 1 + 0.3 * random(d + 1)[:-1], 1e-5) if normed else None


def plainly(qkv: Tensor, heads: Heads, turn: Turn, norms: HeadNorms | None) -> list[Tensor]:
    """Queries, keys and values of qkv (T, columns), as language.py makes them: split, normed, turned."""
    q, k, v = (x.unflatten(1, (-1, heads.width)) for x in qkv.split([n * heads.width for n in (heads[0], heads[1], heads[1])], 1))
    cosine, sine = (table[turn.places.long()][:, None] for table in (turn.cosine, turn.sine))
    if norms is not None:
        q, k = (F.rms_norm(x, (heads.width,), weight, norms.eps) for x, weight in ((q, norms.query), (k, norms.key)))
    return [rotate(q, cosine, sine), rotate(k, cosine, sine), v]


def angles(length: int, d: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(length)[:, None] * torch.logspace(0, -2, d // 2)
    return torch.cat((angle, angle), 1).cos().to(DEVICE), torch.cat((angle, angle), 1).sin().to(DEVICE)


@pytest.mark.parametrize(
    ("hq", "hk", "d", "splits", "normed"), [(4, 2, 24, 1, False), (6, 2, 64, 4, False), (16, 1, 32, 2, True)]
)
def test_rows_grow_as_whole_rows_would(
    hq: int, hk: int, d: int, splits: int, normed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the last token of each row is put by one kernel; the last is put, and looks back, by the other."""
    monkeypatch.setattr(attend, "splits_of", lambda programs: splits)
    heads, norms, lengths = Heads(hq, hk, d), some_norms(d, normed), [1, 65, 130]
    widths = [-(-length // BLOCK) for length in lengths]
    order = torch.randperm(sum(widths)).split(widths)
    keys, values = (torch.full((sum(widths), hk, BLOCK, d), torch.nan, device=DEVICE) for _ in range(2))
    table = torch.full((3, max(widths) + 3), 10**6, dtype=torch.int32)[:, 1:]  # what lies behind a row is never read
    cosine, sine = angles(max(lengths), d)
    last, oracle = [], []
    for row, (length, blocks) in enumerate(zip(lengths, order, strict=True)):
        qkv = random(length, heads.columns)
        table[row, : len(blocks)] = blocks
        at = torch.arange(length)
        turn = Turn(cosine, sine, at.to(DEVICE, torch.int32))
        slots = (blocks[at // BLOCK] * (hk * BLOCK) + at % BLOCK).to(DEVICE)
        last.append(qkv[-1].clone())
        oracle.append(one_row(*plainly(qkv.clone(), heads, turn, norms))[-1].flatten())
        if length > 1:
            before = Turn(cosine, sine, turn.places[:-1])
            attend.turn_and_put(qkv[:-1], heads, before, norms, slots[:-1], keys, values)
    positions = torch.tensor(lengths, dtype=torch.int32, device=DEVICE) - 1
    out = attend.grow(torch.stack(last), heads, Turn(cosine, sine, positions), norms, keys, values, table.to(DEVICE), positions)
    torch.testing.assert_close(out, torch.stack(oracle), atol=2e-5, rtol=1e-4)
    held = torch.cat([keys[blocks].transpose(1, 2).flatten(0, 1)[:n] for blocks, n in zip(order, lengths, strict=True)])
    assert held.isfinite().all() and int(keys.isfinite().sum()) == sum(lengths) * hk * d, "a token is missing, or too many"


def test_prompts_are_turned_and_put() -> None:
    heads, norms = Heads(6, 3, 24), some_norms(24, True)
    keys, values = (torch.zeros((4, 3, BLOCK, 24), device=DEVICE) for _ in range(2))
    cosine, sine = angles(30, 24)
    wide = random(5, heads.columns + 8)
    qkv, turn = wide[:, :-8], Turn(cosine, sine, torch.tensor([3, 29, 0, 7, 7], dtype=torch.int32, device=DEVICE))
    q, k, v = plainly(qkv.clone(), heads, turn, norms)
    at = torch.tensor([5, 63, 17, 40, 0])  # block * B + offset
    slots = (at // BLOCK * 3 * BLOCK + at % BLOCK).to(DEVICE)
    attend.turn_and_put(qkv, heads, turn, norms, slots, keys, values)
    torch.testing.assert_close(qkv, torch.cat([x.flatten(1) for x in (q, k, v)], 1), atol=1e-5, rtol=1e-4)
    for store, new in ((keys, k), (values, v)):
        torch.testing.assert_close(store.transpose(1, 2).flatten(0, 1)[at], new, atol=1e-5, rtol=1e-4)
        assert int((store != 0).sum()) == new.numel()


@pytest.mark.parametrize(("hq", "hk", "d", "block"), [(4, 2, 24, 16), (3, 3, 64, 32), (4, 1, 16, 128)])
@pytest.mark.parametrize(
    ("parts", "at_once"), [([(0, 5), (33, 40)], 16), ([(0, 150), (31, 33), (16, 96)], 64), ([(127, 128), (64, 260)], 128)]
)
def test_prompts_look_back_through_their_blocks(
    hq: int, hk: int, d: int, block: int, parts: list[tuple[int, int]], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with and without a past, in blocks that lie anywhere; what stands behind a row is never read."""
    if at_once == 128:  # as for longer rows
        monkeypatch.setattr(prompts, "QUERIES_AT_ONCE", {1000: 128})
    heads = Heads(hq, hk, d)
    widths = [-(-end // block) for _, end in parts]
    order = torch.randperm(sum(widths), generator=torch.Generator().manual_seed(1)).split(widths)
    keys, values = (torch.full((sum(widths), hk, block, d), torch.nan, device=DEVICE) for _ in range(2))
    table, asked, oracle = torch.full((len(parts), max(widths)), 10**6, dtype=torch.int32), [], []
    for row, ((start, end), blocks) in enumerate(zip(parts, order, strict=True)):
        whole = random(end, heads.columns + row)[:, : heads.columns]
        q, k, v = (x.unflatten(1, (-1, d)) for x in whole.split([n * d for n in (hq, hk, hk)], 1))
        at = torch.arange(end)
        for store, new in ((keys, k), (values, v)):
            store.transpose(1, 2)[blocks[at // block], at % block] = new
        table[row, : len(blocks)] = blocks
        asked.append(whole[start:])
        oracle.append(one_row(q, k, v)[start:].flatten(1))
    told, queries = planned(parts)
    assert queries == at_once
    plan = Plan(told[:3].to(DEVICE), told[3].to(DEVICE), queries)
    out = look_back(torch.cat(asked), heads, plan, keys, values, table.to(DEVICE))
    torch.testing.assert_close(out, torch.cat(oracle), atol=2e-5, rtol=1e-4)


def test_few_rows_are_cut_into_many_stretches() -> None:
    assert [attend.splits_of(programs) for programs in (8, 64, 256, 2048)] == [32, 8, 2, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_small_steps_are_those_of_torch(dtype: torch.dtype) -> None:
    norm = RMSNorm(96, 1e-5).to(DEVICE, dtype)
    norm.weight.data = random(96, dtype=dtype)
    x, more = random(5, 96, dtype=dtype), random(5, 97, dtype=dtype)[:, :-1].contiguous()
    torch.testing.assert_close(steps.rms_norm(x, norm.weight, norm.eps), norm(x), **near(dtype))
    summed, normed = steps.add_norm(x, more, norm.weight, norm.eps)
    torch.testing.assert_close(summed, x + more, **near(dtype))  # the interpreter rounds bfloat16 in its own way
    torch.testing.assert_close(normed, norm(x + more), **near(dtype))
    both = random(3, 2 * 1100, dtype=dtype)
    first, second = both.chunk(2, 1)
    torch.testing.assert_close(steps.gate(both), F.silu(first) * second, **near(dtype))


def test_new_tokens_are_read_as_told_or_as_drawn() -> None:
    table = random(50, 96)
    drawn = torch.tensor([7, 3, 49], device=DEVICE)
    ids, places = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([11, 0, 0, 2], [-1, 2, 0, -1]))
    assert torch.equal(steps.read(ids, places, drawn, table), table[[11, 49, 7, 2]])


def test_the_likeliest_id_is_the_lowest_of_the_largest_and_broken_rows_are_told() -> None:
    logits = random(6, 9000, dtype=torch.bfloat16)
    logits[0, [5000, 4000, 8999]] = 9.0  # a tie
    logits[1, 8999] = 9.0
    logits[2, 7000] = torch.nan
    logits[3, 4999] = torch.inf
    logits[4] = -torch.inf
    drawn = torch.full((2, 8), 77, device=DEVICE)
    steps.likeliest(logits, drawn[0, :6], drawn[1, :6])
    assert drawn[0, :4].tolist() == [4000, 8999, 7000, 4999] and drawn[1, :6].tolist() == [1, 1, 0, 0, 0, 1]
    assert (drawn[:, 6:] == 77).all() and 0 <= int(drawn[0, 4]) < 9000
    whole = logits[[0, 1, 5]]
    plain = likeliest(whole)
    assert torch.equal(drawn[:, [1, 5]], plain[:, 1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [96, 2048, 5000])  # less than one turn of the loop, one, two and a rest
def test_products_of_one_row_are_those_of_torch(dtype: torch.dtype, width: int) -> None:
    x, norm = random(1, width, dtype=dtype), RMSNorm(width, 1e-5).to(DEVICE, dtype)
    norm.weight.data = 1 + 0.3 * random(width, dtype=dtype)
    weight, bias, residual = random(22, width, dtype=dtype) / width**0.5, random(22, dtype=dtype), random(1, 22, dtype=dtype)
    torch.testing.assert_close(product(x, weight), F.linear(x, weight), **near(dtype))
    both = product(x, weight, norm=norm.weight, eps=norm.eps, bias=bias)
    torch.testing.assert_close(both, F.linear(norm(x), weight, bias), **near(dtype))
    added = product(x, weight, bias=bias, residual=residual)
    torch.testing.assert_close(added, F.linear(x, weight, bias) + residual, **near(dtype))
    first, second = F.linear(norm(x), weight).chunk(2, 1)
    gated = product(x, weight, norm=norm.weight, eps=norm.eps, gated=True)
    torch.testing.assert_close(gated, F.silu(first) * second, **near(dtype))
