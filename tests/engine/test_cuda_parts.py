"""What the engine puts together for a GPU gives what the plain parts give; without a GPU in Triton's interpreter.

Torch's packed kernel and CUDA's graphs run on a GPU alone; without one a loop over rows and a pass each time stand in for them.
"""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from engine.a_triton import DEVICE  # isort: skip
from engine.guests import ask
from engine.test_core import prompt, shown, tiny_loaded
from engine.test_paged import Held
from tessella.engine import paged_cuda
from tessella.engine.core import Core
from tessella.engine.fast import HEAD, ROWS_TOGETHER, FastDecoder
from tessella.engine.graphs import DecodeGraphs, DecodeStep, sizes_to
from tessella.engine.kernels.attend import HeadNorms, Heads, Turn
from tessella.engine.lora import Adapter, Adapters, Run
from tessella.engine.paged import BlockStore, Paged
from tessella.engine.paged_cuda import PagedCuda
from tessella.engine.request import EngineSettings, Request
from tessella.engine.scheduler import Part
from tessella.generate import generate
from tessella.model.attend import Causal
from tessella.model.layers import rotary, rotate
from tessella.sampling import SamplingParams
from tiny import family, tiny_model

DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
NEAR = {"atol": 3e-2, "rtol": 3e-2} if torch.cuda.is_available() else {"atol": 2e-5, "rtol": 1e-4}


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


def turn_of(places: list[int], config: object) -> Turn:
    """Angles of every place, and which of them each token has."""
    cosine, sine = rotary(config, torch.arange(64, device=DEVICE), 64, DTYPE)  # type: ignore[arg-type]
    return Turn(cosine[:, 0].contiguous(), sine[:, 0].contiguous(), torch.tensor(places, dtype=torch.int32, device=DEVICE))


@pytest.mark.parametrize(("size", "own"), [(4, False), (4, True), (16, False), (16, True)])  # of 4 tokens torch's own has to do
def test_growing_rows_and_prompts_with_and_without_a_past_in_one_step(size: int, own: bool) -> None:
    config = family("InternLM2").language
    heads = Heads(config.num_heads, config.num_kv_heads, config.head_dim)
    rows = [(5, 1), (0, 1), (31, 1), (0, 9), (12, 7)]  # past, new
    torch.manual_seed(0)
    numbers = iter(torch.randperm(40).tolist())
    held = [Held([next(numbers) for _ in range(-(-sum(row) // size))]) for row in rows]
    parts = [Part(row, past, past + new) for row, (past, new) in zip(held, rows, strict=True)]  # type: ignore[arg-type]
    stores = [BlockStore(config, 40, size, DEVICE, DTYPE) for _ in range(2)]
    stores[0].keys.normal_()
    stores[0].values.normal_()
    stores[1].keys.copy_(stores[0].keys)
    stores[1].values.copy_(stores[0].values)
    turn = turn_of([at for _, start, end in parts for at in range(start, end)], config)
    qkv = torch.randn(len(turn.places), heads.columns).to(DEVICE, DTYPE)
    q, k, v = (
        x.unflatten(1, (-1, heads.width)) for x in qkv.clone().split([n * heads.width for n in (heads[0], *[heads[1]] * 2)], 1)
    )
    cosine, sine = (table[turn.places.long()][:, None] for table in (turn.cosine, turn.sine))
    plain = Paged(stores[0], parts, DEVICE)(1, rotate(q, cosine, sine), rotate(k, cosine, sine), v)
    fast = PagedCuda(stores[1], heads, turn, parts, DEVICE, own=own)(1, qkv, None)
    torch.testing.assert_close(fast, plain.flatten(1), **NEAR)
    torch.testing.assert_close(stores[0].keys, stores[1].keys, **NEAR)
    torch.testing.assert_close(stores[0].values, stores[1].values)


class Alone:
    """A JoinedAttend of one row without a past, in plain torch."""

    def __init__(self, heads: Heads, turn: Turn):
        self.heads, self.turn = heads, turn

    def __call__(self, layer: int, qkv: Tensor, norms: HeadNorms | None) -> Tensor:
        hq, hk, d = self.heads
        q, k, v = (x.unflatten(1, (-1, d)) for x in qkv.split([hq * d, hk * d, hk * d], 1))
        if norms is not None:
            q, k = (torch.nn.functional.rms_norm(x, (d,), weight, norms.eps) for x, weight in ((q, norms.query), (k, norms.key)))
        cosine, sine = (table[self.turn.places.long()][:, None] for table in (self.turn.cosine, self.turn.sine))
        return Causal([len(qkv)], DEVICE)(layer, rotate(q, cosine, sine), rotate(k, cosine, sine), v).flatten(1)


@pytest.mark.parametrize("name", ["InternLM2", "Qwen2", "Qwen3"])  # plain; with biases; with norms over heads and a tied head
@pytest.mark.parametrize("tokens", [1, 5])
def test_the_joined_decoder_computes_what_the_model_does_and_holds_nothing_twice(name: str, tokens: int) -> None:
    model = tiny_model(family(name)).to(DEVICE, DTYPE)
    config = model.config.language
    x = torch.randn(tokens, config.hidden_size).to(DEVICE, DTYPE)
    places = torch.arange(tokens, device=DEVICE)
    with torch.inference_mode():
        plain = model.language_model.run(x, rotary(config, places, 64, DTYPE), Causal([tokens], DEVICE))
        bytes_before = sum(weight.nbytes for weight in model.parameters())
        fast = FastDecoder(model, Adapters(model), single=True)
        heads = fast.heads
        hidden = fast.run(x, Alone(heads, turn_of(list(range(tokens)), config)))
        torch.testing.assert_close(hidden, plain, **NEAR)
        torch.testing.assert_close(fast.logits(hidden), model.logits(plain), **NEAR)
        again = model.language_model.run(x, rotary(config, places, 64, DTYPE), Causal([tokens], DEVICE))
    assert torch.equal(again, plain), "joining changed a weight"
    storages = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in model.parameters()}
    filled_up = -config.vocab_size % ROWS_TOGETHER * config.hidden_size * DTYPE.itemsize  # the head, to whole rows of cuBLAS
    assert sum(storages.values()) == bytes_before + filled_up and len(fast.head) % ROWS_TOGETHER == 0


def test_an_adapter_of_the_head_changes_its_own_rows() -> None:
    """The filled-up head is no module, so no hook of it is called; the rows that are filled up are never seen."""
    model = tiny_model(family("InternLM2")).to(DEVICE, DTYPE)
    head = model.language_model.lm_head
    assert head is not None and head.out_features % ROWS_TOGETHER
    hidden = torch.randn(5, head.in_features).to(DEVICE, DTYPE)
    pair = torch.randn(2, head.in_features).to(DEVICE, DTYPE), torch.randn(head.out_features, 2).to(DEVICE, DTYPE)
    adapters = Adapters(model)
    with torch.inference_mode():
        fast = FastDecoder(model, adapters, single=True)
        adapter = Adapter("one", 1, {HEAD: pair}, {})
        adapters.hook(adapter)
        adapters.runs = [Run(adapter, 1, 3)]
        logits, expected = fast.logits(hidden), model.logits(hidden)
        adapters.runs = ()
        torch.testing.assert_close(logits, expected, **NEAR)
        assert (logits - model.logits(hidden)).abs().amax(1).gt(0.1).tolist() == [False, True, True, False, False]


def test_a_captured_steps_arithmetic_is_that_of_a_plain_one() -> None:
    """The pass that a graph records, run without recording: a known id, one drawn before, and fillers."""
    model = tiny_model(family("InternLM2")).to(DEVICE, DTYPE)
    language = model.config.language
    stores = [BlockStore(language, 12, 4, DEVICE, DTYPE) for _ in range(2)]
    held = [Held([3, 1, 7]), Held([2])]
    held[0].tokens, held[0].place = [0] * 9, 3  # type: ignore[attr-defined]
    held[1].tokens, held[1].place = [30], 0  # type: ignore[attr-defined]
    parts = [Part(row, start, start + 1) for row, start in zip(held, (9, 0), strict=True)]  # type: ignore[arg-type]
    drawn = torch.zeros((2, 6), dtype=torch.int64, device=DEVICE)
    drawn[0, 3] = 17  # the id of the first row
    ids, positions = torch.tensor([17, 30], device=DEVICE), torch.tensor([9, 0], device=DEVICE)
    with torch.inference_mode():
        turn = rotary(language, positions, 0, DTYPE)
        hidden = model.language_model.run(model.language_model.embed(ids), turn, Paged(stores[0], parts, DEVICE))
        logits = model.logits(hidden)
        table = turn_of([], language)
        step = DecodeStep(FastDecoder(model, Adapters(model), single=True), stores[1], table.cosine, table.sine, drawn, 20)
        told = step.fill(parts, 4)
        step.told[: len(told)].copy_(told)
        captured = step.run(4)
    torch.testing.assert_close(captured[:2], logits, **NEAR)
    assert drawn[0, :2].tolist() == captured[:2].argmax(1).tolist() and drawn[1, :2].tolist() == [1, 1]
    torch.testing.assert_close(stores[1].keys[:, :12], stores[0].keys[:, :12], **NEAR)


class Repeated:
    """A graph's place: the pass is run again, and its logits are put where the first ones were."""

    def __init__(self, step: DecodeStep, size: int):
        self.step, self.size = step, size
        self.logits = step.run(size)

    def pool(self) -> None:
        return None

    def replay(self) -> None:
        self.logits.copy_(self.step.run(self.size))


def test_a_whole_engine_of_kernels_gives_the_ids_of_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, a picture, a second question from the cache; steps run ahead, ids stay on the device."""
    monkeypatch.setattr(DecodeGraphs, "_captured", lambda self, size, pool: (graph := Repeated(self.step, size), graph.logits))
    loaded = tiny_loaded(DEVICE.type, str(DTYPE).removeprefix("torch."))
    how = EngineSettings(block_tokens=16, cache_tokens=512, max_running=2, run_ahead=True)
    asked = [
        (prompt(loaded), SamplingParams(max_tokens=4)),
        (shown(loaded, "red"), SamplingParams(max_tokens=3, temperature=1.0, seed=3)),
    ]
    plain = [list(generate(loaded.model, one, params, ())) for one, params in asked]
    core = Core(loaded.model, loaded.tokenizer, how)
    if core.runner.fast is None:
        core.runner.take_kernels(how, 2, core.longest_row)
    captured = []
    run = core.runner.fast.graphs.run  # type: ignore[union-attr]
    monkeypatch.setattr(core.runner.fast.graphs, "run", lambda parts: captured.append(len(parts)) or run(parts))  # type: ignore[union-attr, func-returns-value]
    for _ in range(2):
        guests = ask(core, [Request(one, params, ()) for one, params in asked])
        equal = sum(a == b for guest, ids in zip(guests, plain, strict=True) for a, b in zip(guest.ids, ids, strict=True))
        assert equal == 7 if DEVICE.type == "cpu" else equal >= 5
    assert 2 in captured and guests[1].usage.cached_tokens > 0


def test_there_is_a_graph_for_every_number_of_rows() -> None:
    assert sizes_to(1)[0] == 1 and sizes_to(512)[-1] >= 512
    assert all(0 < b - a <= 32 for a, b in pairwise(sizes_to(512)))
