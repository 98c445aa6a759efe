"""What one answer promises: how it ends, what it says of itself, and that nothing stays behind."""

import dataclasses
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from PIL import Image
from torch import Tensor

from engine.guests import Guest, ask, join, run
from tessella.chat import Message
from tessella.checkpoint.lowrank import Pair
from tessella.checkpoint.read import Loaded, load
from tessella.engine.core import Core
from tessella.engine.request import EngineSettings, Request
from tessella.errors import ConfigError, ContextError, EngineError
from tessella.generate import generate, stream_text
from tessella.inputs import ModelInput, Picture
from tessella.sampling import SamplingParams
from tiny import tiny_folder

DRAWN = SamplingParams(max_tokens=16, temperature=1.0, seed=3)
SETTINGS = EngineSettings(block_tokens=4, cache_tokens=800, max_batch_tokens=32, max_batch_tiles=2)


def tiny_loaded(device: str = "cpu", dtype: str = "float32") -> Loaded:
    with TemporaryDirectory() as home:
        folder = tiny_folder(Path(home) / "model", "LlamaForCausalLM", 0)
        return load(folder, device=device, dtype=dtype, system="You are short.")


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return tiny_loaded()


@pytest.fixture
def core(loaded: Loaded) -> Core:
    return Core(loaded.model, loaded.tokenizer, SETTINGS)


def prompt(loaded: Loaded, text: str = "hello") -> ModelInput:
    return loaded.inputs.build([Message("user", text)])


def shown(loaded: Loaded, colour: str, tiles: int = 1) -> ModelInput:
    picture = Picture(Image.new("RGB", (28 * tiles, 28), colour), max_tiles=tiles)
    return loaded.inputs.build([Message("user", "<image>\nWhat?")], [picture])


def test_the_text_is_that_of_the_plain_way_and_the_last_piece_tells_what_it_took(loaded: Loaded, core: Core) -> None:
    (guest,) = ask(core, [Request(prompt(loaded), DRAWN, loaded.stop_ids)])
    plain = stream_text(loaded.model, prompt(loaded), DRAWN, loaded.tokenizer, loaded.stop_ids)
    assert guest.text == "".join(plain) and guest.finish == "length"
    assert all(piece.finish is None and piece.usage is None for piece in guest.pieces[:-1])
    usage = guest.usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.answer_tokens, usage.tiles) == (len(prompt(loaded)), 0, 16, 0)
    assert usage.seconds_to_first_token is not None and usage.seconds_to_first_token > 0


def test_a_stop_id_ends_an_answer_and_is_not_given_out(loaded: Loaded, core: Core) -> None:
    free = list(generate(loaded.model, prompt(loaded), DRAWN, ()))
    (guest,) = ask(core, [Request(prompt(loaded), DRAWN, (free[5],))])
    assert guest.ids == free[: free.index(free[5])] and guest.finish == "stop" and guest.usage.answer_tokens == len(guest.ids)


@pytest.mark.parametrize("start", [0, 3, 9])
def test_a_stop_string_ends_an_answer_and_nothing_after_it_is_given_out(loaded: Loaded, core: Core, start: int) -> None:
    whole = "".join(stream_text(loaded.model, prompt(loaded), DRAWN, loaded.tokenizer, ()))
    params = dataclasses.replace(DRAWN, stop=(whole[start : start + 4],))
    (guest,) = ask(core, [Request(prompt(loaded), params, ())])
    assert guest.text == whole[: whole.find(params.stop[0])] and guest.finish == "stop"


def test_a_cancelled_answer_ends_at_once_and_frees_its_blocks(loaded: Loaded, core: Core) -> None:
    guests = [join(core, Request(prompt(loaded, text), DRAWN, ())) for text in ("hello", "what is it")]
    core.step()
    row = guests[0].row
    assert row is not None and row.blocks
    before = len(guests[0].ids)
    core.end(row, "cancelled")
    core.end(row, "cancelled")  # twice is once
    assert guests[0].finish == "cancelled" and len(guests[0].ids) == before and not row.blocks
    run(core)
    assert sum(piece.finish is not None for piece in guests[0].pieces) == 1 and guests[1].finish == "length"
    assert core.book.available == core.book.count and core.ended["cancelled"] == 1


def test_one_that_waits_can_be_cancelled_and_counts_as_never_run(loaded: Loaded) -> None:
    core = Core(loaded.model, loaded.tokenizer, dataclasses.replace(SETTINGS, max_running=1))
    first, second = (join(core, Request(prompt(loaded), DRAWN, ())) for _ in range(2))
    core.step()
    assert second.row is not None and not second.row.was_admitted
    core.end(second.row, "cancelled")
    assert second.finish == "cancelled" and second.usage.answer_tokens == 0 and core.ended_waiting == 1
    run(core)
    assert first.finish == "length"


def test_a_prompt_that_can_never_fit_is_refused_with_numbers(loaded: Loaded) -> None:
    core = Core(loaded.model, loaded.tokenizer, dataclasses.replace(SETTINGS, cache_tokens=40))
    fits = 40 - len(prompt(loaded))
    with pytest.raises(ContextError, match=f"at most 40 together: ask for at most {fits}"):
        core.make_row(Request(prompt(loaded), dataclasses.replace(DRAWN, max_tokens=fits + 1), ()), print)
    assert ask(core, [Request(prompt(loaded), dataclasses.replace(DRAWN, max_tokens=fits), ())])[0].finish == "length"


def test_a_long_prompt_does_not_stop_the_others(loaded: Loaded, core: Core) -> None:
    """While 13 tiles and a long text are read in pieces, one who was there before gets a token each step."""
    there = join(core, Request(prompt(loaded), dataclasses.replace(DRAWN, max_tokens=60), ()))
    core.step()
    picture = Picture(Image.new("RGB", (56 * 4, 56 * 3), "red"), max_tiles=12)
    long = loaded.inputs.build([Message("user", "<image>" + "What is it? " * 20)], [picture])
    late = join(core, Request(long, DRAWN, ()))
    steps = 0
    while not late.ids:
        before = len(there.ids)
        core.step()
        steps += 1
        assert len(there.ids) == before + 1
    assert steps >= len(long) // 32
    run(core)


def test_tiles_are_seen_once_for_all_requests_and_within_the_budget(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core(loaded.model, loaded.tokenizer, dataclasses.replace(SETTINGS, max_batch_tokens=200))
    seen: list[int] = []
    plain = loaded.model.visual_tokens
    monkeypatch.setattr(
        loaded.model, "visual_tokens", lambda tiles, questions: (seen.append(len(tiles)), plain(tiles, questions))[1]
    )
    ask(core, [Request(shown(loaded, colour), DRAWN, ()) for colour in ("red", "blue", "red", "green", "white")])
    ask(core, [Request(shown(loaded, "blue"), DRAWN, ())])
    assert sum(seen) == 4 and max(seen) <= 2
    assert core.scheduler.counters.tiles == 4


class Only:
    """A mask that allows some ids, one after the other, and then a stop id."""

    def __init__(self, ids: list[int], stop: int, fault: str | None = None):
        self.ids, self.stop, self.fault, self.told = ids, stop, fault, list[int]()

    def fill(self, bits: Tensor) -> None:
        bits.zero_()
        allowed = self.ids[len(self.told)] if len(self.told) < len(self.ids) else self.stop
        if allowed >= 0:
            bits[allowed // 32] = torch.tensor(1 << (allowed % 32), dtype=torch.int64).to(torch.int32)

    def accept(self, token_id: int) -> None:
        if self.fault:
            raise EngineError(self.fault)
        self.told.append(token_id)


@pytest.mark.parametrize("params", [DRAWN, SamplingParams(max_tokens=16)])
def test_a_mask_decides_what_may_come_and_hears_of_it(loaded: Loaded, core: Core, params: SamplingParams) -> None:
    stop = loaded.stop_ids[0]
    mask = Only([31, 32, 63, 300], stop)
    masked, free = ask(core, [Request(prompt(loaded), params, (stop,), mask=mask), Request(prompt(loaded), params, ())])
    assert masked.ids == mask.told == [31, 32, 63, 300] and masked.finish == "stop"
    assert free.ids == list(generate(loaded.model, prompt(loaded), params, ()))


def test_a_mask_that_cannot_go_on_ends_its_own_answer_alone(loaded: Loaded, core: Core) -> None:
    stuck, broken = Only([5, -1], -1), Only([5], 2, "no such branch")
    guests = ask(core, [Request(prompt(loaded), DRAWN, (2,), mask=mask) for mask in (stuck, broken, None)])
    assert [guest.finish for guest in guests] == ["error", "error", "length"]
    assert guests[0].ids == [5] and "allows no token" in str(guests[0].pieces[-1].error)
    assert guests[1].ids == [] and guests[1].pieces[-1].error == "no such branch"
    assert core.book.available == core.book.count


def test_numbers_that_are_not_finite_end_an_answer_with_an_error(loaded: Loaded, core: Core) -> None:
    """One adapter overflows; who shares the batch with it gets the plain answer."""
    name = "language_model.model.layers.1.mlp.down_proj"
    out, width = loaded.model.get_submodule(name).weight.shape
    huge = Pair(torch.full((1, width), 3e38), torch.full((out, 1), 3e38), 1.0)
    core.load_adapter("huge", {name: huge}, {})
    bad, good = ask(core, [Request(prompt(loaded), DRAWN, (), adapter="huge"), Request(prompt(loaded), DRAWN, ())])
    assert bad.finish == "error" and "no longer finite" in str(bad.pieces[-1].error)
    assert good.ids == list(generate(loaded.model, prompt(loaded), DRAWN, ()))


def test_an_id_without_a_token_ends_its_answer_with_an_error(loaded: Loaded, core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published models have a few rows more than tokens; what the engine cannot spell must not end the engine."""
    monkeypatch.setattr(loaded.tokenizer, "vocab_size", 300)
    params = dataclasses.replace(DRAWN, max_tokens=100)
    (guest,) = ask(core, [Request(prompt(loaded), params, ())])
    assert guest.finish == "error" and "not among the tokenizer's 300" in str(guest.pieces[-1].error)
    assert all(token < 300 or token in loaded.tokenizer.added_tokens() for token in guest.ids)


NAME = "language_model.model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("pairs", "whole", "told"),
    [
        ({"language_model.model.layers.9.mlp.up_proj": (96, 64)}, {}, "does not have"),
        ({NAME: (96, 63)}, {}, r"must be \(96, 64\)"),
        ({"language_model.model.embed_tokens": (0, 64)}, {}, "no linear layer"),
        ({}, {"language_model.model.norm.weight": (64,)}, "merge it with tessella convert"),
        ({}, {"mlp1.0.weight": (3,)}, "must be"),
    ],
)
def test_an_adapter_that_cannot_run_beside_others_is_refused_by_name(
    loaded: Loaded, core: Core, pairs: dict[str, tuple[int, int]], whole: dict[str, tuple[int, ...]], told: str
) -> None:
    rows = loaded.config.language.vocab_size
    made = {name: Pair(torch.zeros(2, width), torch.zeros(out or rows, 2), 1.0) for name, (out, width) in pairs.items()}
    with pytest.raises(EngineError, match=told):
        core.load_adapter("bad", made, {name: torch.zeros(shape) for name, shape in whole.items()})
    assert not core.adapters


def test_names_of_adapters_are_kept_apart(loaded: Loaded, core: Core) -> None:
    with pytest.raises(EngineError, match='no adapter "a" is loaded; there is none'):
        core.make_row(Request(prompt(loaded), DRAWN, (), adapter="a"), print)
    core.load_adapter("a", {}, {})
    with pytest.raises(EngineError, match="loaded already"):
        core.load_adapter("a", {}, {})
    core.unload_adapter("a")
    with pytest.raises(EngineError, match='no adapter "a"'):
        core.unload_adapter("a")
    nan = Pair(torch.full((2, 64), float("nan")), torch.zeros(96, 2), 1.0)
    with pytest.raises(EngineError, match="not finite"):
        core.load_adapter("a", {NAME: nan}, {})


def test_the_model_is_left_without_hooks(loaded: Loaded, core: Core) -> None:
    core.load_adapter("a", {NAME: Pair(torch.ones(1, 64), torch.ones(96, 1), 1.0)}, {})
    ask(core, [Request(prompt(loaded), DRAWN, (), adapter="a")])
    layer = loaded.model.get_submodule(NAME)
    assert layer._forward_hooks
    core.runner.leave()
    assert not layer._forward_hooks


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_tokens", 0),
        ("cache_tokens", 0),
        ("cache_fraction", 0.0),
        ("max_batch_tokens", 0),
        ("max_batch_tiles", -1),
        ("max_running", 0),
        ("max_waiting", 0),
        ("vision_cache_bytes", -1),
    ],
)
def test_a_setting_out_of_range_is_refused_with_name_and_value(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{field} is {value}, must be"):
        EngineSettings(**{field: value})  # type: ignore[arg-type]


def test_a_cache_without_a_single_block_is_refused(loaded: Loaded) -> None:
    with pytest.raises(ConfigError, match="no block of 16 tokens fits"):
        Core(loaded.model, loaded.tokenizer, EngineSettings(cache_tokens=15))


def test_requests_out_of_range_are_refused(loaded: Loaded) -> None:
    with pytest.raises(ConfigError, match="logprobs is 21"):
        Request(prompt(loaded), DRAWN, (), logprobs=21)


def test_a_guest_hears_nothing_after_the_end(loaded: Loaded, core: Core) -> None:
    guests: list[Guest] = ask(core, [Request(prompt(loaded), DRAWN, ())])
    count = len(guests[0].pieces)
    ask(core, [Request(prompt(loaded), DRAWN, ())])
    assert len(guests[0].pieces) == count and sum(piece.finish is not None for piece in guests[0].pieces) == 1
