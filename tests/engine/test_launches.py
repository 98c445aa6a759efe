"""What a GPU is asked to do in a step, counted without one: tensors have shapes but no numbers, kernels are counted, not run.

A tensor that was left on the host, an `item()` or a shape that hangs on data ends such a run, as each would end a capture.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.a_triton import DEVICE  # isort: skip
from engine.test_paged import Held
from tessella.engine import fast_run, paged_cuda
from tessella.engine.fast_run import FastRun
from tessella.engine.graphs import DecodeStep
from tessella.engine.kernels import attend, products, prompts, steps
from tessella.engine.lora import Adapters
from tessella.engine.paged import BlockStore
from tessella.engine.request import EngineSettings
from tessella.engine.scheduler import Part
from tessella.model.layers import rope_frequencies
from tessella.model.vision_language import VisionLanguageModel
from tiny import family

if DEVICE.type == "cuda":
    pytest.skip("a GPU runs the steps themselves", allow_module_level=True)

FREE = {"view", "_unsafe_view", "t", "transpose", "slice", "select", "split_with_sizes", "unsqueeze", "alias", "detach", "expand"}
FREE |= {"empty", "empty_like", "new_empty", "as_strided", "unbind", "permute", "unflatten", "flatten"}
LAYERS = 3


class Counted(TorchDispatchMode):
    """Kernels of torch that are launched; views and allocations are none."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name not in FREE and isinstance(out, torch.Tensor) and out.device.type == "meta":  # the host's own do not count
            self.seen[name] += 1
        return out


class Launch:
    """Stands for a Triton kernel."""

    def __init__(self, name: str, seen: Counter[str]):
        self.name, self.seen = name, seen

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(side > 0 for side in grid)
        return self._launch

    def _launch(self, *args: Any, **sizes: Any) -> None:
        assert all(one.device.type == "meta" for one in args if isinstance(one, torch.Tensor)), f"{self.name} reads from the host"
        self.seen[self.name] += 1


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Triton's kernels that were launched since."""
    seen: Counter[str] = Counter()
    names = {attend: ("_grow", "_combine", "_turn_and_put"), products: ("_product",), prompts: ("_look_back",)}
    names[steps] = ("_add_norm", "_gate", "_read", "_best_of_some", "_best_of_all")
    for module, kernels in names.items():
        for name in kernels:
            monkeypatch.setattr(module, name, Launch(name, seen))
    monkeypatch.setattr(paged_cuda, "packed", lambda q, *others: torch.empty_like(q))
    for module in (fast_run, paged_cuda):
        if hasattr(module, "sent"):
            monkeypatch.setattr(module, "sent", lambda x, device: x.to(device))
    yield seen


def fake_run(name: str = "InternLM2") -> tuple[FastRun, DecodeStep]:
    """Of a model without numbers."""
    config = family(name)
    config = dataclasses.replace(config, language=dataclasses.replace(config.language, num_layers=LAYERS))
    with torch.device("meta"):
        model = VisionLanguageModel(config).to(torch.bfloat16)
    store = BlockStore(config.language, 40, 16, torch.device("meta"), torch.bfloat16)
    drawn = torch.zeros((2, 64), dtype=torch.int64, device="meta")
    frequencies = rope_frequencies(config.language, 0, torch.device("meta"))
    how = EngineSettings(cuda_graphs=False)
    run = FastRun(model, Adapters(model), store, drawn, frequencies, how, 32, 256)
    return run, DecodeStep(run.decoder, store, run.cosine, run.sine, drawn, 256)


def test_a_captured_step_of_one_row_is_six_launches_a_layer_and_nothing_of_torch(launched: Counter[str]) -> None:
    with torch.inference_mode():
        _, step = fake_run()
        launched.clear()
        with Counted() as torchs:
            logits = step.run(1)
    assert logits.device.type == "meta" and logits.shape == (1, step.decoder.table.shape[0])
    assert torchs.seen == {}
    assert launched["_product"] == 4 * LAYERS + 1 and launched["_grow"] == launched["_combine"] == LAYERS
    assert sum(launched.values()) == 6 * LAYERS + 5


@pytest.mark.parametrize("name", ["InternLM2", "Qwen2", "Qwen3"])
def test_a_captured_step_of_many_rows_is_four_products_and_at_most_five_kernels_a_layer(
    name: str, launched: Counter[str]
) -> None:
    with torch.inference_mode():
        _, step = fake_run(name)
        launched.clear()
        with Counted() as torchs:
            step.run(32)
    assert sum(torchs.seen.values()) == 4 * LAYERS + 1 and set(torchs.seen) == {"linear"}
    assert sum(launched.values()) <= 5 * LAYERS + 4 and not launched["_product"]


def test_a_prompt_is_four_products_a_layer_and_few_kernels_also_with_a_past(launched: Counter[str]) -> None:
    """Growing rows, a prompt, and the second question about a picture in one step: nothing in it waits for the device."""
    rows = [(30, 1), (0, 40), (100, 20)]
    parts = [Part(Held(list(range(8))), past, past + new) for past, new in rows]  # type: ignore[arg-type]
    with torch.inference_mode():
        run, _ = fake_run()
        launched.clear()
        embeddings = torch.empty((61, 64), device="meta", dtype=torch.bfloat16)
        positions = torch.empty(61, dtype=torch.int64, device="meta")
        with Counted() as before:
            attend_once = run.hidden(embeddings, parts, positions, run.frequencies)
    assert attend_once.shape == (61, 64)
    products_ = before.seen["linear"]
    assert products_ == 4 * LAYERS
    each_layer = (sum(before.seen.values()) - products_) / LAYERS
    assert each_layer <= 3 and before.seen["cat"] == LAYERS, (
        before.seen
    )  # both kinds of rows joined; the rest is made once a step
    assert launched["_look_back"] == LAYERS and sum(launched.values()) <= 7 * LAYERS + 1
