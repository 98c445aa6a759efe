"""The engine gives the ids of generate.py in float32: alone, in company, in any order of arrival, with what it finds in its
caches, after preemption, beside cancelled neighbours, with pictures, with adapters."""

import dataclasses
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from engine.guests import Guest, ask, join, run
from tessella.chat import Message
from tessella.checkpoint.lowrank import Adapter, Pair, merge_adapter
from tessella.checkpoint.read import Loaded, load
from tessella.config import ConnectorConfig
from tessella.engine.core import Core
from tessella.engine.request import EngineSettings, Request
from tessella.engine.scheduler import Batch
from tessella.generate import all_logits, generate
from tessella.inputs import Inputs, ModelInput, Picture
from tessella.sampling import SamplingParams
from tiny import family, tiny_config, tiny_folder, tiny_model

GREEDY = SamplingParams(max_tokens=12)
DRAWN = SamplingParams(max_tokens=20, temperature=1.0, seed=5)
PENALISED = SamplingParams(max_tokens=9, temperature=0.8, top_p=0.9, seed=6, repetition_penalty=1.3, frequency_penalty=0.4)
PARAMS = (GREEDY, DRAWN, PENALISED)
ROOMY = EngineSettings(block_tokens=4, cache_tokens=2000, max_batch_tokens=64, max_batch_tiles=4, max_running=8)

AHEAD = dataclasses.replace(ROOMY, run_ahead=True)

FIRST = "InternLM2"  # the family of most tests; a cached function has it named, or it would make two of everything


@cache
def loaded(name: str) -> Loaded:
    """A tiny model; InternLM2's and Phi-3's angles stretch within the lengths that are asked for here."""
    config = family(name)
    with TemporaryDirectory() as home:
        folder = tiny_folder(Path(home) / "model", config.language.architecture, 0, config=config)
        return trained_for(50, load(folder, device="cpu", dtype="float32", system="You are short."))


def trained_for(tokens: int, one: Loaded) -> Loaded:
    """The same model as if it had been trained on that length; its context stays longer."""
    model = one.model
    if model.config.language.rope_dynamic_factor is not None:
        model.config = dataclasses.replace(
            model.config, language=dataclasses.replace(model.config.language, max_positions=tokens)
        )
        model.language_model.config = model.config.language
    return one


@cache
def prompts(name: str) -> tuple[ModelInput, ...]:
    """Some begin alike, some differ in nothing but their pictures, one is asked again after its first answer."""
    build = loaded(name).inputs.build
    red, blue = (Picture(Image.new("RGB", (28, 28), colour), max_tiles=1) for colour in ("red", "blue"))
    wide = Picture(Image.linear_gradient("L").resize((168, 56)).convert("RGB"), max_tiles=3)
    what = Message("user", "<image>\nWhat is it?")
    return (
        build([Message("user", "hello")]),
        build([Message("user", "hello, how are you? There are 3 bowls of rice on the table.")]),
        build([what], [red]),
        build([what], [blue]),
        build([what, Message("assistant", "It is rice."), Message("user", "图中是什么食物？")], [red]),
        build([Message("user", "<image><image>Which one?")], [wide, blue]),
    )


@cache
def plain(number: int, params: SamplingParams, name: str = FIRST) -> list[int]:
    one = loaded(name)
    return list(generate(one.model, prompts(name)[number], params, one.stop_ids))


def request(number: int, params: SamplingParams, name: str = FIRST, **more: object) -> Request:
    return Request(prompts(name)[number], params, loaded(name).stop_ids, **more)  # type: ignore[arg-type]


def core(settings: EngineSettings = ROOMY, name: str = FIRST) -> Core:
    return Core(loaded(name).model, loaded(name).tokenizer, settings)


def test_the_answers_that_are_compared_tell_prompts_and_pictures_apart() -> None:
    answers = [tuple(plain(number, DRAWN)) for number in range(len(prompts(FIRST)))]
    assert len(set(answers)) == len(answers)


def test_alone_and_again_from_the_cache() -> None:
    one = core()
    for number in range(len(prompts(FIRST))):
        for _ in range(2):
            (guest,) = ask(one, [request(number, DRAWN)])
            assert guest.ids == plain(number, DRAWN)
        assert guest.usage.cached_tokens == (len(prompts(FIRST)[number]) - 1) // 4 * 4


@pytest.mark.parametrize("how", [ROOMY, AHEAD], ids=["", "ahead"])
def test_in_company_in_any_order(how: EngineSettings) -> None:
    for order in list(permutations(range(len(prompts(FIRST)))))[::90]:
        guests = ask(core(how), [request(number, DRAWN) for number in order])
        assert [guest.ids for guest in guests] == [plain(number, DRAWN) for number in order]


@pytest.mark.parametrize("name", ["Qwen3", "Phi-3", "InternVL-Chat 1.5"])
def test_in_every_family(name: str) -> None:
    guests = ask(core(name=name), [request(number, DRAWN, name) for number in range(len(prompts(name)))])
    assert [guest.ids for guest in guests] == [plain(number, DRAWN, name) for number in range(len(guests))]


@dataclass(frozen=True)
class Visit:
    """One request of a random walk: what, when it comes, and when it is cancelled, if it is."""

    prompt: int
    params: SamplingParams
    comes: int
    goes: int | None


visits = st.builds(
    Visit, st.integers(0, 5), st.sampled_from(PARAMS), st.integers(0, 25), st.one_of(st.none(), st.none(), st.integers(0, 40))
)
longest = 76  # tokens of the longest prompt with the longest answer, and a little
engines = st.builds(
    EngineSettings,
    block_tokens=st.sampled_from([1, 4, 16]),
    cache_tokens=st.sampled_from([longest + 16, longest + 60, 2000]),
    max_batch_tokens=st.sampled_from([1, 7, 64]),
    max_batch_tiles=st.sampled_from([1, 3]),
    max_running=st.sampled_from([2, 8]),
    vision_cache_bytes=st.sampled_from([0, 3000, 10**6]),
    run_ahead=st.booleans(),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(visits, min_size=1, max_size=7), engines)
def test_with_random_arrivals_cancelled_neighbours_and_little_room(walk: list[Visit], how: EngineSettings) -> None:
    one = core(how)
    plan = one.scheduler.next_batch

    def planned() -> Batch | None:
        batch = plan()
        if batch is not None:
            assert 0 < sum(end - start for _, start, end in batch.parts) <= (how.max_batch_tokens or 0)
            assert batch.tiles <= (how.max_batch_tiles or 0) and len(one.scheduler.running) <= (how.max_running or 0)
            assert len({id(part.row) for part in batch.parts}) == len(batch.parts)
        return batch

    one.scheduler.next_batch = planned  # type: ignore[method-assign]
    guests: dict[int, Guest] = {}
    for step in range(3000):
        for number, visit in enumerate(walk):
            if visit.comes == step:
                guests[number] = join(one, request(visit.prompt, visit.params))
            if visit.goes is not None and visit.comes <= step == visit.comes + visit.goes:
                row = guests[number].row
                assert row is not None
                one.end(row, "cancelled")
        one.step()
        if len(guests) == len(walk) and not one.live:
            break
    for number, visit in enumerate(walk):
        expected = plain(visit.prompt, visit.params)
        if guests[number].finish == "cancelled":
            assert guests[number].ids == expected[: len(guests[number].ids)]
        else:
            assert guests[number].ids == expected
    assert one.book.available == one.book.count, "blocks were lost"


@pytest.mark.parametrize("roomy", [ROOMY, AHEAD], ids=["", "ahead"])
def test_after_preemption(roomy: EngineSettings) -> None:
    """Room for one and a half: rows are put back again and again, and nobody notices."""
    how = dataclasses.replace(roomy, cache_tokens=longest + 12)
    one = core(how)
    guests = ask(one, [request(number, DRAWN) for number in (5, 1, 4, 0)])
    assert one.scheduler.counters.preemptions > 0
    assert [guest.ids for guest in guests] == [plain(number, DRAWN) for number in (5, 1, 4, 0)]


def test_a_step_runs_ahead_unless_somebody_waits_for_its_ids() -> None:
    """Ids come one step later than they are drawn; beside one whose next id hangs on its last ones, at once."""
    one = core(AHEAD)
    first = join(one, request(0, DRAWN))
    for step in range(4):
        one.step()
        assert len(first.ids) == step and first.row is not None and first.row.pending == 1
    second = join(one, request(1, PENALISED))
    while not second.ids:
        one.step()
    while second.finish is None:
        assert first.row.pending == 0
        one.step()
    run(one)
    assert [first.ids, second.ids] == [plain(0, DRAWN), plain(1, PENALISED)]


def test_a_row_that_ends_while_a_step_runs_ahead_leaves_its_blocks_to_others() -> None:
    """Its blocks are given away and written to while the step that still held it is under way; everybody's answer is right."""
    first = plain(0, DRAWN)
    stop = (first[4],)
    how = dataclasses.replace(AHEAD, cache_tokens=len(prompts(FIRST)[5]) + DRAWN.max_tokens + 8, max_running=2)
    one = core(how)
    guests = [join(one, Request(prompts(FIRST)[0], DRAWN, stop)), join(one, request(5, DRAWN)), join(one, request(3, DRAWN))]
    run(one)
    assert guests[0].ids == first[: first.index(stop[0])] and guests[0].finish == "stop"
    assert [guest.ids for guest in guests[1:]] == [plain(5, DRAWN), plain(3, DRAWN)]
    assert one.book.available == one.book.count


def test_several_answers_to_one_prompt_share_its_blocks() -> None:
    seeds = [dataclasses.replace(DRAWN, seed=seed) for seed in range(4)]
    one = core()
    guests = ask(one, [request(5, params) for params in seeds])
    assert [guest.ids for guest in guests] == [plain(5, params) for params in seeds]
    assert len({tuple(guest.ids) for guest in guests}) == 4
    full = (len(prompts(FIRST)[5]) - 1) // 4 * 4
    assert [guest.usage.cached_tokens for guest in guests] == [0, full, full, full]
    assert one.scheduler.counters.tiles == len(set(prompts(FIRST)[5].digests))


def test_logprobs_are_those_of_the_plain_logits() -> None:
    (guest,) = ask(core(), [request(5, DRAWN, logprobs=3)])
    prompt = prompts(FIRST)[5]
    ids = torch.cat([prompt.ids, torch.tensor(guest.ids)])
    told = torch.zeros(len(guest.ids), dtype=torch.bool)
    whole = dataclasses.replace(prompt, ids=ids, learn=torch.cat([prompt.learn, told]), slots=torch.cat([prompt.slots, told]))
    # The row turns by the angles of prompt and longest answer; a prompt of that length has them, too.
    assert len(whole) == len(prompt) + DRAWN.max_tokens
    oracle = all_logits(loaded(FIRST).model, whole)[len(prompt) - 1 : -1].log_softmax(-1)
    best = oracle.topk(3)
    for place, one in enumerate(guest.logprobs):
        assert one.id == guest.ids[place] and one.logprob == pytest.approx(float(oracle[place, one.id]), abs=1e-4)
        assert [token for token, _ in one.top] == best.indices[place].tolist()
        assert [value for _, value in one.top] == pytest.approx(best.values[place].tolist(), abs=1e-4)


@pytest.mark.parametrize("batch_tiles", [2, 8])  # less than one picture has, and more
def test_pictures_whose_tiles_are_laid_out_together(batch_tiles: int) -> None:
    """LLaVA-NeXT's rule: a picture has as many slots as its window and its whole view, and is seen and kept as one."""
    config = tiny_config("LlamaForCausalLM")
    connector = ConnectorConfig("mlp", newline=True)
    config = dataclasses.replace(config, tile_rule="anyres", grids=((1, 2), (2, 1), (2, 2)), connector=connector)
    model = tiny_model(config, 1)
    build = Inputs(config, loaded("Llama 3.1").tokenizer, system="You are short.").build
    gradient = Image.linear_gradient("L").convert("RGB")
    wide, tall, small = (Picture(gradient.resize(size)) for size in ((168, 56), (60, 150), (40, 40)))
    what = Message("user", "<image>\nWhat is it?")
    asked = [
        build([what], [wide]),
        build([Message("user", "<image><image>Which one?")], [tall, small]),
        build([Message("user", "hello")]),
        build([what, Message("assistant", "A line."), Message("user", "Why?")], [wide]),
    ]
    assert len({len(one.tiles) for one in asked}) > 2
    params = dataclasses.replace(DRAWN, max_tokens=8)
    expected = [list(generate(model, one, params, ())) for one in asked]
    how = dataclasses.replace(AHEAD, max_batch_tiles=batch_tiles)
    one = Core(model, loaded("Llama 3.1").tokenizer, how)
    for again in (False, True):
        guests = ask(one, [Request(prompt, params, ()) for prompt in asked])
        assert [guest.ids for guest in guests] == expected
        assert again == all(guest.usage.cached_tokens > 0 for guest in guests if guest.usage.tiles)
    assert one.scheduler.counters.tiles == sum(len(prompt.tiles) for prompt in asked[:2]), "a picture was seen twice"


# ---- adapters


def some_adapter(seed: int, *, seeing: bool) -> Adapter:
    """Random pairs on the decoder and its head; seeing: on tower and projector, too, and a whole tensor of the projector."""
    chance = torch.Generator().manual_seed(seed)
    model = loaded(FIRST).model
    modules = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    pairs = {}
    for name in modules:
        if name.startswith("language_model.") or seeing:
            out, width = model.get_submodule(name).weight.shape
            a, b = (torch.randn(*shape, generator=chance) for shape in ((3, width), (out, 3)))
            pairs[name] = Pair(a / width**0.5, b / 3**0.5, 0.7)
    whole: dict[str, Tensor] = {}
    if seeing:
        whole["mlp1.0.weight"] = 1 + 0.3 * torch.randn(model.mlp1[0].weight.shape, generator=chance)
    return Adapter(Path("random"), "tiny", pairs, whole)


@cache
def merged(seed: int, seeing: bool) -> Loaded:
    with TemporaryDirectory() as home:
        config = loaded(FIRST).config
        folder = tiny_folder(Path(home) / "m", "InternLM2ForCausalLM", 0, config=config)
        other = trained_for(50, load(folder, device="cpu", dtype="float32"))
    merge_adapter(other.model, some_adapter(seed, seeing=seeing))
    return other


@pytest.mark.parametrize("how", [ROOMY, AHEAD], ids=["", "ahead"])
def test_several_adapters_in_one_batch_answer_as_their_merged_models(how: EngineSettings) -> None:
    one = core(how)
    kinds = {"a": (1, False), "b": (2, True)}
    for name, (seed, seeing) in kinds.items():
        adapter = some_adapter(seed, seeing=seeing)
        one.load_adapter(name, adapter.pairs, adapter.whole)
    asked = [(number, name) for number in (5, 2, 1) for name in ("b", None, "a")]
    for _ in range(2):  # the second time from the cache
        guests = ask(one, [request(number, DRAWN, adapter=name) for number, name in asked])
        for guest, (number, name) in zip(guests, asked, strict=True):
            model = loaded(FIRST).model if name is None else merged(*kinds[name]).model
            assert guest.ids == list(generate(model, prompts(FIRST)[number], DRAWN, loaded(FIRST).stop_ids)), (number, name)
    assert guests[0].ids != guests[1].ids != guests[2].ids
    assert all(guest.usage.cached_tokens > 0 for guest in guests)


def test_an_adapter_that_is_gone_stays_with_its_answers_and_its_name_gives_nothing_old() -> None:
    one = core()
    first, second = some_adapter(1, seeing=True), some_adapter(2, seeing=True)
    one.load_adapter("a", first.pairs, first.whole)
    under_way = join(one, request(2, DRAWN, adapter="a"))
    one.step()
    one.unload_adapter("a")
    one.load_adapter("a", second.pairs, second.whole)
    after = join(one, request(2, DRAWN, adapter="a"))
    run(one)
    for guest, seed in ((under_way, 1), (after, 2)):
        assert guest.ids == list(generate(merged(seed, True).model, prompts(FIRST)[2], DRAWN, loaded(FIRST).stop_ids))


def test_an_adapter_changes_nothing_bit_by_bit_for_those_who_do_not_ask_for_it() -> None:
    one = core()
    (before,) = ask(one, [request(1, DRAWN, logprobs=5)])
    adapter = some_adapter(1, seeing=True)
    one.load_adapter("a", adapter.pairs, adapter.whole)
    ask(one, [request(1, DRAWN, adapter="a")])
    fresh = core()
    (after,) = ask(fresh, [request(1, DRAWN, logprobs=5)])
    assert before.logprobs == after.logprobs
