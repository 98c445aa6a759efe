"""Routing tokens: chosen by the model alone, their queries run, in batch as well as alone; without one nothing changes."""

from pathlib import Path

import pytest
import torch

from tessella.chat import Message
from tessella.checkpoint.read import Loaded, load
from tessella.generate import all_logits, generate_batch
from tessella.inputs import Inputs, ModelInput
from tessella.model.attend import Causal
from tessella.model.routing import Routed, Routing
from tessella.routes import KINDS, routes_for
from tessella.sampling import SamplingParams
from tiny import tiny_folder

GREEDY = SamplingParams(max_tokens=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "model", "LlamaForCausalLM", 0)


def routed_model(folder: Path) -> Loaded:
    """The tiny model with routing whose tokens it hardly ever says by itself."""
    loaded = load(folder, device="cpu", dtype="float32")
    routes = routes_for(loaded.config.language.vocab_size)
    routing = Routing(routes, loaded.config.language.hidden_size)
    routing.begin(
        loaded.model.language_model.model.embed_tokens.weight,
        loaded.model.language_model.model.embed_tokens.weight,
        torch.Generator().manual_seed(1),
    )
    loaded.model.routing = routing
    loaded.tokenizer = loaded.tokenizer.with_routes(routes)
    loaded.inputs = Inputs(loaded.config, loaded.tokenizer)
    return loaded


def prompts(loaded: Loaded) -> list[ModelInput]:
    texts = ("hello", "What is in this picture?", "a b c", "图中是什么食物？")
    return [loaded.inputs.build([Message("user", text)]) for text in texts]


def made_to_say(loaded: Loaded, name: str, after: int) -> Loaded:
    """The model says this routing token at the places where it would have said its answer's token number `after`."""
    routing = loaded.model.routing
    assert routing is not None
    one = prompts(loaded)[1]
    ids = generate_batch(loaded.model, [one], GREEDY, ())[0]
    head = loaded.model.language_model.lm_head
    table = head.weight if head is not None else loaded.model.language_model.model.embed_tokens.weight
    place = routing.routes.named(name).token_id - routing.routes.first_id
    with torch.no_grad():
        routing.head[place] = 1.05 * table[ids[after]]
    return loaded


def with_routes(loaded: Loaded) -> tuple[list[list[int]], list[Routed]]:
    found: list[Routed] = []
    ids = generate_batch(loaded.model, prompts(loaded), GREEDY, loaded.stop_ids, routed=found.append)
    return ids, found


def test_without_a_routing_token_the_logits_are_the_same_to_the_bit(folder: Path) -> None:
    plain, routed = load(folder, device="cpu", dtype="float32"), routed_model(folder)
    for before, after in zip(prompts(plain), prompts(routed), strict=True):
        assert torch.equal(before.ids, after.ids)
        old, new = all_logits(plain.model, before), all_logits(routed.model, after)
        assert torch.equal(old, new[:, : old.shape[1]]) and new.shape[1] == old.shape[1] + len(KINDS)


def test_a_typed_routing_token_is_text(folder: Path) -> None:
    loaded = routed_model(folder)
    for role_text in ("[DET]", "say [GEN] please", "[SEG][EDIT]"):
        one = loaded.inputs.build([Message("user", role_text), Message("assistant", "no"), Message("user", role_text)])
        assert one.queries is None and int(one.ids.max()) < loaded.tokenizer.routes.first_id
        assert role_text in loaded.tokenizer.decode(one.ids.tolist())


def test_in_an_answer_to_learn_the_queries_stand_and_are_not_learned(folder: Path) -> None:
    loaded = routed_model(folder)
    talk = [Message("user", "find"), Message("assistant", "apple[DET], a drawing[GEN].")]
    one = loaded.inputs.build(talk, open_turn=False)
    routes = loaded.tokenizer.routes
    assert one.queries is not None
    for name, count in (("[DET]", 4), ("[GEN]", 64)):
        route = routes.named(name)
        places = (one.ids == route.token_id).nonzero()[:, 0].tolist()
        assert len(places) == 1 + count
        assert one.learn[places[0]] and not one.learn[places[1:]].any()
        assert one.queries[places].tolist() == [-1, *range(route.first, route.first + count)]
    assert one.learn[int(places[-1]) + 1], "text goes on behind the queries"
    assert int((one.queries >= 0).sum()) == 68


@pytest.mark.parametrize("after", [0, 3])
def test_a_chosen_token_routes_in_company_as_alone(folder: Path, after: int) -> None:
    loaded = made_to_say(routed_model(folder), "[DET]", after)
    ids, found = with_routes(loaded)
    assert found, "the model was made to say it"
    for row, one in enumerate(prompts(loaded)):
        alone: list[Routed] = []
        assert generate_batch(loaded.model, [one], GREEDY, loaded.stop_ids, routed=alone.append)[0] == ids[row]
        company = [each for each in found if each.row == row]
        assert len(alone) == len(company)
        for a, b in zip(alone, company, strict=True):
            assert a.said == b.said and a.route == b.route
            assert ids[row][a.said - 1] == a.route.token_id
            torch.testing.assert_close(a.states, b.states, atol=1e-4, rtol=1e-4)


def test_the_states_are_those_of_the_same_answer_read_at_once(folder: Path) -> None:
    """Generated token by token with a cache, or laid out as in teaching: one truth."""
    loaded = made_to_say(routed_model(folder), "[SEG]", 2)
    model = loaded.model
    ids, found = with_routes(loaded)
    first = found[0]
    prompt = prompts(loaded)[first.row]
    route = first.route
    answer = torch.tensor(ids[first.row][: first.said])
    row = torch.cat((prompt.ids, answer, torch.full((route.queries,), route.token_id)))
    queries = torch.full((len(row),), -1)
    queries[-route.queries :] = torch.arange(route.first, route.first + route.queries)
    if route.token_id in answer[:-1].tolist():
        pytest.skip("an earlier route stands in the answer")
    with torch.inference_mode():
        hidden = model(model.embed_text(row, queries), torch.arange(len(row)), Causal([len(row)]), len(row))
    torch.testing.assert_close(first.states, hidden[-route.queries :], atol=1e-4, rtol=1e-4)


def test_queries_count_as_tokens_and_what_does_not_fit_does_not_route(folder: Path) -> None:
    loaded = made_to_say(routed_model(folder), "[GEN]", 0)  # 64 queries do not fit into 24 tokens
    ids, found = with_routes(loaded)
    route = loaded.tokenizer.routes.named("[GEN]")
    assert not found and any(route.token_id in row for row in ids)
    assert all(row[-1] == route.token_id for row in ids if route.token_id in row), "it ends there"
    more = SamplingParams(max_tokens=65)
    exact: list[Routed] = []
    row = generate_batch(loaded.model, prompts(loaded)[1:2], more, (), routed=exact.append)[0]
    assert len(exact) == 1 and exact[0].states.shape[0] == 64 and row == [route.token_id]
