"""What the engine puts together for a GPU gives what the plain parts give; without a GPU in Triton's interpreter.

Torch's packed kernel runs on a GPU alone; without one a loop over rows stands in for it.
"""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from engine.a_triton import DEVICE  # isort: skip
from engine.test_paged import Held
from tessella.engine import paged_cuda
from tessella.engine.graphs import TABLE, DecodeGraphs, sizes_to
from tessella.engine.paged import BlockStore, Paged
from tessella.engine.paged_cuda import PagedCuda, block_table
from tessella.engine.scheduler import Part
from tessella.engine.swap import swap_in
from tessella.model.attend import Causal
from tessella.model.layers import rope_frequencies, rotary
from tiny import family, tiny_model

DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
NEAR = {"atol": 2e-2, "rtol": 2e-2} if torch.cuda.is_available() else {"atol": 1e-5, "rtol": 1e-4}


def row_by_row(q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, longest_q: int, longest_k: int) -> Tensor:
    """What attend.packed promises."""
    out = []
    for (q0, q1), (k0, k1) in zip(pairwise(starts_q.tolist()), pairwise(starts_k.tolist()), strict=True):
        n, m, shared = q1 - q0, k1 - k0, q.shape[1] // k.shape[1]
        assert n <= longest_q and m <= longest_k
        keys, values = (x[k0:k1].repeat_interleave(shared, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1], keys) * q.shape[-1] ** -0.5
        sees = torch.arange(m) <= torch.arange(m - n, m)[:, None]
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~sees, float("-inf")).softmax(-1), values))
    return torch.cat(out)


@pytest.fixture(autouse=True)
def packed_anywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if DEVICE.type == "cpu":
        monkeypatch.setattr(paged_cuda, "packed", row_by_row)
    yield


def test_growing_rows_and_prompts_with_and_without_a_past_in_one_step() -> None:
    config = family("InternLM2").language
    rows = [(5, 1), (0, 1), (31, 1), (0, 9), (12, 7)]  # past, new
    torch.manual_seed(0)
    numbers = iter(torch.randperm(40).tolist())
    held = [Held([next(numbers) for _ in range(-(-sum(row) // 4))]) for row in rows]
    parts = [Part(row, past, past + new) for row, (past, new) in zip(held, rows, strict=True)]  # type: ignore[arg-type]
    stores = [BlockStore(config, 40, 4, DEVICE, DTYPE) for _ in range(2)]
    stores[0].keys.normal_()
    stores[0].values.normal_()
    stores[1].keys.copy_(stores[0].keys)
    stores[1].values.copy_(stores[0].values)
    count = sum(new for _, new in rows)
    new = [torch.randn(count, heads, config.head_dim).to(DEVICE, DTYPE) for heads in (config.num_heads, 2, 2)]
    plain, fast = (
        kind(store, parts, DEVICE)(1, *(x.clone() for x in new)) for kind, store in zip((Paged, PagedCuda), stores, strict=True)
    )
    torch.testing.assert_close(fast, plain, **NEAR)
    torch.testing.assert_close(stores[0].keys, stores[1].keys)
    torch.testing.assert_close(stores[0].values, stores[1].values)


@pytest.mark.parametrize("name", ["InternLM2", "Qwen3"])  # one with, one without a norm over heads
def test_a_swapped_model_gives_the_same_and_can_be_swapped_back(name: str) -> None:
    model = tiny_model(family(name)).to(DEVICE, DTYPE)
    language = model.language_model
    x = torch.randn(6, 64).to(DEVICE, DTYPE)
    turn = rotary(model.config.language, torch.arange(6, device=DEVICE), 6, DTYPE)
    with torch.inference_mode():
        plain = language.run(x, turn, Causal([6], DEVICE))
        undo = swap_in(model)
        swapped = language.run(x, turn, Causal([6], DEVICE))
        undo()
        again = language.run(x, turn, Causal([6], DEVICE))
    torch.testing.assert_close(swapped, plain, **NEAR)
    assert not torch.equal(swapped, plain) or torch.bfloat16 == DTYPE, "nothing was swapped"
    assert torch.equal(again, plain)


def test_a_captured_steps_arithmetic_is_that_of_a_plain_one() -> None:
    """The pass that a graph records, run without recording: input rows with fillers against the plain Attend."""
    model = tiny_model(family("InternLM2")).to(DEVICE, DTYPE)
    language = model.config.language
    stores = [BlockStore(language, 12, 4, DEVICE, DTYPE) for _ in range(2)]
    held = [Held([3, 1, 7]), Held([2])]
    parts = [Part(row, start, start + 1) for row, start in zip(held, (9, 0), strict=True)]  # type: ignore[arg-type]
    ids, positions = torch.tensor([17, 30], device=DEVICE), torch.tensor([9, 0], device=DEVICE)
    step = DecodeGraphs.__new__(DecodeGraphs)  # without capturing, which needs a GPU
    step.model, step.store, step.frequencies = model, stores[1], rope_frequencies(language, 0, DEVICE)
    rows = torch.zeros((4, TABLE + 5), dtype=torch.int32)
    rows[:, TABLE:] = stores[1].filler
    rows[:2, 0], rows[:2, 1] = ids.cpu(), positions.cpu()
    rows[:2, TABLE : TABLE + 3] = block_table([row.blocks for row in held], stores[1].filler)
    with torch.inference_mode():
        captured = step._pass(rows.to(DEVICE))[:2]
        turn = rotary(language, positions, 0, DTYPE)
        hidden = model.language_model.run(model.language_model.embed(ids), turn, Paged(stores[0], parts, DEVICE))
        torch.testing.assert_close(captured, model.logits(hidden), **NEAR)
    torch.testing.assert_close(stores[1].keys[:, :12], stores[0].keys[:, :12], **NEAR)


def test_there_is_a_graph_for_every_number_of_rows() -> None:
    assert sizes_to(1)[0] == 1 and sizes_to(256)[-1] >= 256
    assert all(0 < b - a <= 32 for a, b in pairwise(sizes_to(256)))


@pytest.mark.gpu
def test_graphs_give_what_the_plain_way_gives_in_bfloat16() -> None:
    """On a GPU, whole engines: with graphs, without, and generate.py agree on nearly all ids."""
    from engine.guests import ask
    from engine.test_core import prompt, tiny_loaded
    from tessella.engine.core import Core
    from tessella.engine.request import EngineSettings, Request
    from tessella.generate import generate
    from tessella.sampling import SamplingParams

    loaded = tiny_loaded("cuda", "bfloat16")
    asked = [Request(prompt(loaded, text), SamplingParams(max_tokens=24), ()) for text in ("hello", "what is it", "rice")]
    plain = [list(generate(loaded.model, one.prompt, one.params, ())) for one in asked]
    for cuda_graphs in (True, False):
        core = Core(loaded.model, loaded.tokenizer, EngineSettings(cache_tokens=4096, max_running=8, cuda_graphs=cuda_graphs))
        assert (core.runner.graphs is not None) == cuda_graphs
        got = [guest.ids for guest in ask(core, asked)]
        core.runner.leave()
        equal = sum(a == b for one, two in zip(got, plain, strict=True) for a, b in zip(one, two, strict=True))
        assert equal >= 0.9 * 72, f"{equal} of 72 ids equal"
