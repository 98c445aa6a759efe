"""What makes a step fast and what it must not cost: logits in pieces, no waiting for the device, few compiled graphs."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("peft", reason="teaching goes through PEFT, which is not installed: it is in the train extra")

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from torch._dynamo.testing import CompileCounterWithBackend

from tessella.checkpoint.read import load
from tessella.model.attend import one_row
from tessella.train import passes as passes_of
from tessella.train.batch import StepData, Steps
from tessella.train.lora import LoraLinear, prepare
from tessella.train.optimiser import Optimiser
from tessella.train.passes import Passes
from tessella.train.recipe import Recipe
from tessella.train.taught import Taught
from test_train_loop import colour_samples, folder, recipe_of

__all__ = ["folder"]  # the fixture


def ready(folder: Path, recipe: Recipe, tokens_per_pass: int = 100) -> tuple[Passes, Taught, StepData]:
    torch.manual_seed(0)
    loaded = load(folder, device="cpu", dtype="float32")
    taught = prepare(loaded.model.train(), recipe)
    steps = Steps(
        colour_samples(8), loaded.inputs, looks=8, samples_per_step=8, tokens_per_pass=tokens_per_pass, seed=recipe.seed
    )  # fmt: skip
    return Passes(loaded.model, recipe), taught, steps[0]


def learn(passes: Passes, taught: Taught, data: StepData) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss of each pack, and the gradients of them all."""
    losses = []
    for pack in data.packs:
        loss = passes.loss(pack)
        loss.backward()
        losses.append(float(loss.detach()))
    return losses, {name: parameter.grad for name, parameter in taught.parameters.items()}


def same(one: tuple[list[float], dict[str, torch.Tensor]], other: tuple[list[float], dict[str, torch.Tensor]]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-6)
    for name, gradient in one[1].items():
        torch.testing.assert_close(other[1][name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("language", ["lora", "full"])
def test_logits_in_pieces_give_the_same_loss_and_gradients(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language: str
) -> None:
    recipe = recipe_of(folder, tmp_path, language=language)
    whole = learn(*ready(folder, recipe, 4096))
    made: list[int] = []
    passes, taught, data = ready(folder, recipe, 4096)
    plain = passes.model.logits

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        made.append(len(hidden))
        return plain(hidden)

    monkeypatch.setattr(passes.model, "logits", logits)
    monkeypatch.setattr(passes_of, "LOGITS_AT_ONCE", 5 * passes.model.config.language.vocab_size)
    same(whole, learn(passes, taught, data))
    learned = data.learned
    assert max(made) == 5 and sum(made) == 2 * learned < sum(data.packs[0].lengths)  # once in each direction, answers only


WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")


class Watch(TorchDispatchMode):
    """Counts the operations whose result the host must wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func).split(".")[1]
        if name.removeprefix("_") in WAITS or name in WAITS:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_device(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run on a CPU, where attention for teaching sorts rows by itself: a GPU's packed kernel is stood in for, row by row."""

    class Rows:
        def __init__(self, lengths: tuple[int, ...], device: object):
            self.lengths = list(lengths)

        def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            rows = zip(q.split(self.lengths), k.split(self.lengths), v.split(self.lengths), strict=True)
            return torch.cat([one_row(*row) for row in rows])

    monkeypatch.setattr(passes_of, "Causal", Rows)
    recipe = recipe_of(folder, tmp_path, tower="lora", lora_dropout=0.1)
    passes, taught, data = ready(folder, recipe)
    optimiser = Optimiser(taught, recipe, 10)
    with Watch() as watch:
        for pack in data.packs:
            passes.share(pack, data).backward()
            optimiser.accumulate()
        norm = optimiser.step(0)
    assert not watch.seen
    with Watch() as watch:
        float(norm.detach())
    assert watch.seen == {"_local_scalar_dense": 1}  # the watch does see


def test_compiled_layers_make_few_graphs_for_packs_of_many_lengths_and_the_same_loss(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(folder, tmp_path)
    plain = learn(*ready(folder, recipe))
    counter = CompileCounterWithBackend("eager")
    compile_layers = passes_of.compile_layers
    monkeypatch.setattr(passes_of, "compile_layers", lambda model: compile_layers(model, counter))
    passes, taught, data = ready(folder, replace(recipe, compile=True))
    assert len({pack.lengths for pack in data.packs}) > 2
    same(plain, learn(passes, taught, data))
    # Before and after attention and at the end of a decoder's layer, with and without a gradient of what comes in; the tower's.
    assert counter.frame_count <= 8


@pytest.mark.parametrize("language", ["lora", "full"])
def test_behind_the_last_attention_only_places_that_learn_are_run(folder: Path, tmp_path: Path, language: str) -> None:
    recipe = recipe_of(folder, tmp_path, language=language)
    passes, taught, data = ready(folder, recipe, 4096)
    (pack,) = data.packs
    passes.token_losses(passes.hidden(pack).index_select(0, pack.predict), pack).sum().backward()
    everywhere = {name: parameter.grad for name, parameter in taught.parameters.items()}
    passes, taught, data = ready(folder, recipe, 4096)
    rows: list[int] = []
    for layer in passes.model.language_model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    losses, gradients = learn(passes, taught, data)
    assert rows == [*[sum(pack.lengths)] * (len(rows) - 1), data.learned] and data.learned < sum(pack.lengths)
    same((losses, everywhere), (losses, gradients))


@pytest.mark.parametrize("base_learns", [True, False])
def test_lora_with_dropout_is_peft_s_own(base_learns: bool) -> None:
    """base_learns: the input has a gradient, as in every layer but the lowest."""
    torch.manual_seed(0)
    block = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(6, 5)}).requires_grad_(False)
    config = LoraConfig(r=2, lora_alpha=6, lora_dropout=0.4, target_modules=["q_proj"], init_lora_weights=False)
    config._register_custom_module({torch.nn.Linear: LoraLinear})
    inject_adapter_in_model(config, block, adapter_name="default")
    layer = block["q_proj"].train()

    def run(forward: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        torch.manual_seed(1)
        x = torch.linspace(-1, 1, 42).reshape(7, 6).requires_grad_(base_learns)
        learning = [layer.lora_A["default"].weight, layer.lora_B["default"].weight, *([x] if base_learns else [])]
        out = forward(x)
        return [out.detach(), *torch.autograd.grad((out * torch.arange(35.0).reshape(7, 5)).sum(), learning)]

    for mine, theirs in zip(run(layer), run(lambda x: PeftLinear.forward(layer, x)), strict=True):
        torch.testing.assert_close(mine, theirs)
