"""The engine on a GPU, smallest parts first, so that the first failure says most: python -m pytest -x -m gpu tests/engine

Beside these, all of test_kernels.py and test_cuda_parts.py runs on a GPU where there is one: python -m pytest tests/engine
"""

import copy
import dataclasses
import gc
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.a_triton import DEVICE  # isort: skip
from engine.guests import ask
from engine.test_core import prompt, shown, tiny_loaded
from engine.test_kernels import angles, plainly, random
from tessella.engine.core import Core
from tessella.engine.engine import Engine
from tessella.engine.kernels import attend, steps
from tessella.engine.kernels.attend import Heads, Turn
from tessella.engine.kernels.products import product
from tessella.engine.request import EngineSettings, Request
from tessella.generate import embed, generate
from tessella.inputs import ModelInput
from tessella.model.attend import Causal
from tessella.model.vision_language import VisionLanguageModel
from tessella.sampling import SamplingParams
from tessella.transfer import Arrival, sent, sent_together

pytestmark = pytest.mark.gpu
FEW = EngineSettings(cache_tokens=4096, max_running=8)


def assert_near(got: Tensor, expected: Tensor) -> None:
    apart = (got.float() - expected).norm() / expected.norm()
    assert float(apart) < 1e-2, f"{float(apart):.4f} apart"  # a NaN is not less


def test_1_triton_compiles_and_runs() -> None:
    x, weight = random(5, 2048, dtype=torch.bfloat16), random(2048, dtype=torch.bfloat16)
    assert_near(steps.rms_norm(x, weight, 1e-5), F.rms_norm(x.float(), (2048,), weight.float(), 1e-5))


def test_2_numbers_cross_without_waiting_and_whole() -> None:
    x = torch.arange(100_000)
    assert torch.equal(Arrival(sent(x, DEVICE) * 2).wait(), x * 2)
    assert torch.equal(sent_together([x, x + 1], DEVICE).cpu(), torch.stack((x, x + 1)))
    assert torch.equal(Arrival(sent(x.view(2, -1), DEVICE)[:, :7]).wait(), x.view(2, -1)[:, :7])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_3_products_of_internvl2_2b(dtype: torch.dtype) -> None:
    x, norm = random(1, 2048, dtype=dtype), 1 + 0.1 * random(2048, dtype=dtype)
    weight = random(16384, 2048, dtype=dtype) / 45
    wide = F.rms_norm(x.float(), (2048,), norm.float(), 1e-5) @ weight.float().T
    assert_near(product(x, weight, norm=norm, eps=1e-5), wide)
    assert_near(product(x, weight, norm=norm, eps=1e-5, gated=True), F.silu(wide[:, :8192]) * wide[:, 8192:])
    down, between = random(2048, 8192, dtype=dtype) / 90, random(1, 8192, dtype=dtype)
    assert_near(product(between, down, residual=x), x.float() + between.float() @ down.float().T)
    head = random(92553, 2048, dtype=dtype)
    assert_near(product(x, head), x.float() @ head.float().T)
    logits, drawn = product(x, head), torch.full((2, 1), -1, device=DEVICE)
    steps.likeliest(logits, drawn[0], drawn[1])
    assert drawn[:, 0].tolist() == [int(logits[0].argmax()), 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "length"), [(1, 3400), (1, 7), (3, 130), (96, 300)])
def test_4_attention_of_internvl2_2b(dtype: torch.dtype, rows: int, length: int) -> None:
    heads, (cosine, sine) = Heads(16, 8, 128), angles(4000, 128)
    width = -(-length // 64)
    keys, values = random(rows * width, 8, 64, 128, dtype=dtype), random(rows * width + 1, 8, 64, 128, dtype=dtype)[:-1]
    table = torch.randperm(rows * width).view(rows, width).to(DEVICE, torch.int32)
    qkv = random(rows, heads.columns, dtype=dtype)
    at = torch.full((rows,), length - 1, dtype=torch.int32, device=DEVICE)
    turn = Turn(cosine.to(dtype), sine.to(dtype), at)
    out = attend.grow(qkv.clone(), heads, turn, None, keys, values, table, at)
    q = plainly(qkv, heads, turn, None)[0]
    for row in range(0, rows, 19):
        blocks = table[row].long()
        k, v = (x[blocks].transpose(1, 2).flatten(0, 1)[:length].float().repeat_interleave(2, 1) for x in (keys, values))
        scores = torch.einsum("hd,khd->hk", q[row].float(), k) / 128**0.5
        assert_near(out[row], torch.einsum("hk,khd->hd", scores.softmax(-1), v).flatten())


@torch.inference_mode()
def test_5_a_graph_gives_what_its_pass_gives_for_new_numbers() -> None:
    loaded = tiny_loaded("cuda", "bfloat16")
    core = Core(loaded.model, loaded.tokenizer, FEW)
    fast = core.runner.fast
    assert fast is not None and fast.graphs is not None
    for size, first in ((1, 5), (2, 9), (8, 3), (8, 40)):
        step = fast.graphs.step
        ids, places, positions, table = step.views(size)
        ids.copy_(torch.arange(first, first + size))
        places.fill_(-1)
        positions.copy_(torch.arange(size))
        table[:, 0] = torch.arange(size)
        passed = step.run(size).clone()
        drawn = step.drawn[:, :size].clone()
        step.drawn.zero_()
        graph, logits = fast.graphs.graphs[size]
        graph.replay()
        assert_near(logits, passed.float())
        assert torch.equal(step.drawn[:, :size], drawn) and bool(drawn[1].all())


def told(model: VisionLanguageModel, asked: ModelInput, ids: Sequence[int]) -> Tensor:
    """Logits (len(ids), V) before each of the ids, in one pass over prompt and ids."""
    more = torch.tensor(ids)
    nothing = torch.zeros(len(ids), dtype=torch.bool)
    whole = dataclasses.replace(
        asked,
        ids=torch.cat((asked.ids, more)),
        learn=torch.cat((asked.learn, nothing)),
        slots=torch.cat((asked.slots, nothing)),
    )
    with torch.inference_mode():
        places = torch.arange(len(whole), device=model.device)
        hidden = model(embed(model, [whole]), places, Causal([len(whole)], model.device), len(whole))
        return model.logits(hidden[len(asked) - 1 : -1]).float()


def assert_parted_at_a_near_tie(got: Sequence[int], plain: Sequence[int], exact: Tensor, rough: Tensor) -> None:
    """Where the engine's ids part from generate.py's, float32 must find the two nearly alike.

    exact, rough (n, V): logits before each of plain's ids, of the same weights in float32 and of the plain way in 16 bits. An id
    that is off by more than twice the rounding of its own run cannot be the likeliest; the kernels' may be twice the plain way's.
    """
    parted = next((i for i, (a, b) in enumerate(zip(got, plain, strict=True)) if a != b), None)
    if parted is None:
        return
    rounding = float((rough[parted] - exact[parted]).abs().max())
    gap = float((exact[parted, plain[parted]] - exact[parted, got[parted]]).abs())
    assert gap <= 4 * rounding, f"parted at id {parted} over a gap of {gap:.4f}, where bfloat16 rounds by {rounding:.4f}"


@pytest.mark.parametrize("off", ["", "run_ahead", "own_prompts", "own_products", "cuda_graphs", "kernels"])
def test_6_whole_engines_agree_with_the_plain_way_with_each_switch_off(off: str) -> None:
    """Ids part from generate.py's at near ties alone, and logarithms are as near to float32's as the plain way's are.

    The switch that mends a failure names the part at fault.
    """
    loaded = tiny_loaded(DEVICE.type, "bfloat16")
    exact = copy.deepcopy(loaded.model).float()
    prompts = [*(prompt(loaded, text) for text in ("hello", "what is it", "rice")), shown(loaded, "red", 3)]
    asked = [Request(one, SamplingParams(max_tokens=24), ()) for one in prompts]
    plain = [list(generate(loaded.model, one.prompt, one.params, ())) for one in asked]
    tables = [[told(model, one, ids) for one, ids in zip(prompts, plain, strict=True)] for model in (exact, loaded.model)]
    core = Core(loaded.model, loaded.tokenizer, dataclasses.replace(FEW, **{off: False} if off else {}))
    for _ in range(2):  # the second time from the cache
        for guest, *compared in zip(ask(core, asked), plain, *tables, strict=True):
            assert_parted_at_a_near_tie(guest.ids, *compared)
        ours, theirs = [], []
        for one, guest in zip(prompts, ask(core, [dataclasses.replace(one, logprobs=0) for one in asked]), strict=True):
            chosen = torch.tensor(guest.ids, device=DEVICE)[:, None]
            right, rough = (
                told(model, one, guest.ids).log_softmax(-1).gather(1, chosen)[:, 0] for model in (exact, loaded.model)
            )
            ours.append(torch.tensor([one.logprob for one in guest.logprobs], device=DEVICE) - right)
            theirs.append(rough - right)
        off_by, usual = (float(torch.cat(x).square().mean().sqrt()) for x in (ours, theirs))
        assert off_by <= 2 * usual, f"logarithms are {off_by:.4f} off float32's, the plain way's {usual:.4f}"
    core.runner.leave()


def test_7_a_seed_gives_the_same_answer_ahead_or_not() -> None:
    loaded = tiny_loaded("cuda", "bfloat16")
    params = SamplingParams(max_tokens=20, temperature=1.0, top_p=0.9, seed=3)
    ids = []
    for run_ahead in (True, False):
        core = Core(loaded.model, loaded.tokenizer, dataclasses.replace(FEW, run_ahead=run_ahead))
        ids.append([guest.ids for guest in ask(core, [Request(prompt(loaded), params, ())])])
        core.runner.leave()
    assert ids[0] == ids[1]


def test_8_an_engine_that_is_gone_leaves_its_memory() -> None:
    loaded = tiny_loaded("cuda", "bfloat16")
    held = []
    for _ in range(3):
        engine = Engine(loaded.model, loaded.tokenizer, FEW)
        engine.start()
        engine.stop()
        del engine
        gc.collect()
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_allocated())
    assert held[2] <= held[1] + 2**20, f"{held} bytes after each of three engines"
