"""Attention over blocks equals attention over whole rows, however the rows are cut and wherever their blocks lie."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessella.engine.paged import BlockStore, Paged
from tessella.engine.scheduler import Part
from tessella.model.attend import one_row
from tiny import tiny_config

LANGUAGE = tiny_config("LlamaForCausalLM").language
CPU = torch.device("cpu")


@dataclass
class Held:
    """As much of a Row as attention needs."""

    blocks: list[int]


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=5),
    st.sampled_from([1, 4, 16]),
    st.integers(0, 99),
)
def test_blocks_give_what_whole_rows_give(rows: list[tuple[int, int]], block_tokens: int, seed: int) -> None:
    torch.manual_seed(seed)
    rows.sort(key=lambda row: row[1] > 1)
    hq, hk, d = LANGUAGE.num_heads, LANGUAGE.num_kv_heads, LANGUAGE.head_dim
    counts = [-(-(past + new) // block_tokens) for past, new in rows]
    store = BlockStore(LANGUAGE, sum(counts), block_tokens, CPU, torch.float32)
    numbers = iter(torch.randperm(sum(counts)).tolist())
    held = [Held([next(numbers) for _ in range(count)]) for count in counts]
    whole = [[torch.randn(past + new, heads, d) for heads in (hq, hk, hk)] for past, new in rows]
    before = [(Part(row, 0, past), qkv) for row, qkv, (past, _) in zip(held, whole, rows, strict=True) if past]  # type: ignore[arg-type]
    for part, (q, k, v) in before:
        Paged(store, [part], CPU)(1, q[: part.end], k[: part.end], v[: part.end])
    parts = [Part(row, past, past + new) for row, (past, new) in zip(held, rows, strict=True)]  # type: ignore[arg-type]
    new = [torch.cat([qkv[i][past:] for qkv, (past, _) in zip(whole, rows, strict=True)]) for i in range(3)]
    out = Paged(store, parts, CPU)(1, *new)
    oracle = torch.cat([one_row(*qkv)[past:] for qkv, (past, _) in zip(whole, rows, strict=True)])
    torch.testing.assert_close(out, oracle, atol=2e-6, rtol=1e-5)
    assert not store.keys[0].any(), "another layer was written to"


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives() -> None:
    torch.manual_seed(0)
    outs = []
    q, k, v = (torch.randn(7, heads, LANGUAGE.head_dim) for heads in (LANGUAGE.num_heads, 2, 2))
    for device in (CPU, torch.device("cuda")):
        store = BlockStore(LANGUAGE, 4, 4, device, torch.float32)
        outs.append(Paged(store, [Part(Held([2, 0]), 0, 7)], device)(0, *(x.to(device) for x in (q, k, v))).cpu())  # type: ignore[arg-type]
    torch.testing.assert_close(*outs)
