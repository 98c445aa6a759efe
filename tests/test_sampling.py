"""sampling.py: greedy is the likeliest id, a seed repeats, and each filter keeps what it says."""

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tessella.errors import ConfigError
from tessella.sampling import GREEDY, Sampler, SamplingParams, draw, next_ids, penalise, penalised, probabilities

LOGITS = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
MIXED = [
    GREEDY,
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.7, top_p=0.8, seed=2),
    SamplingParams(temperature=1.5, top_k=5, min_p=0.1, seed=3, presence_penalty=1.0),
    SamplingParams(repetition_penalty=1.5, frequency_penalty=0.5),
]
rows = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=50).map(torch.tensor)


def kept(logits: torch.Tensor, **fields: float) -> list[int]:
    return probabilities(logits[None], [SamplingParams(temperature=1.0, **fields)])[0].nonzero().flatten().tolist()


def drawn(params: SamplingParams, count: int = 40, logits: torch.Tensor | None = None) -> list[int]:
    sampler = Sampler(params)
    return [sampler.next(torch.zeros(1000) if logits is None else logits, [], []) for _ in range(count)]


@settings(deadline=None)
@given(rows)
def test_greedy_takes_the_likeliest(logits):
    assert Sampler(GREEDY).next(logits, [], []) == int(logits.argmax())


def test_a_seed_repeats_and_another_does_not():
    params = SamplingParams(temperature=1.0, seed=7)
    assert drawn(params) == drawn(params)
    assert drawn(params) != drawn(dataclasses.replace(params, seed=8))
    free = SamplingParams(temperature=1.0)
    assert drawn(free) != drawn(free)


def test_a_seed_does_not_hang_on_the_global_generator():
    params = SamplingParams(temperature=1.0, seed=7)
    torch.manual_seed(1)
    first = drawn(params)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert drawn(params) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_follow_the_probabilities():
    draws = torch.tensor(drawn(SamplingParams(temperature=1.0, seed=0), 4000, LOGITS))
    assert torch.allclose(draws.bincount(minlength=4) / 4000, LOGITS.exp(), atol=0.03)


def test_each_filter_keeps_what_it_says():
    assert kept(LOGITS) == [0, 1, 2, 3]
    assert kept(LOGITS, top_k=2) == [0, 1]
    assert kept(LOGITS, top_p=0.6) == [0, 1]  # 0.4 is short of 0.6, the id that reaches it is kept
    assert kept(LOGITS, top_p=0.75) == [0, 1, 2]
    assert kept(LOGITS, min_p=0.6) == [0, 1]
    assert kept(LOGITS, top_p=1e-9) == [0]
    assert kept(torch.zeros(5), top_k=2) == [0, 1]  # a tie goes to the lower id


@settings(deadline=None)
@given(rows, st.floats(0.01, 5), st.floats(0.01, 1), st.integers(0, 10), st.floats(0, 0.99))
@example(torch.tensor([-1.4e-45, 0.0]), 2.0, 0.5, 0, 0.0)  # the division makes these two a tie
def test_filters_leave_a_distribution_that_holds_the_likeliest(logits, temperature, top_p, top_k, min_p):
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    p = probabilities(logits[None], [params])[0]
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    assert p[logits.argmax()] == p.max() > 0
    assert top_k == 0 or int((p > 0).sum()) <= top_k


def test_temperature_flattens_and_sharpens():
    cold = probabilities(LOGITS[None], [SamplingParams(temperature=0.5)])[0]
    assert torch.allclose(cold, torch.tensor([16.0, 9, 4, 1]) / 30)
    assert torch.allclose(probabilities(LOGITS[None], [SamplingParams(temperature=1e-30)])[0], torch.tensor([1.0, 0, 0, 0]))


def test_the_repetition_penalty_lowers_what_was_seen_and_spares_the_input():
    logits = torch.tensor([2.0, -2.0, 1.0])
    assert penalise(logits, [0, 1, 1], 2.0).tolist() == [1.0, -4.0, 1.0]
    assert logits.tolist() == [2.0, -2.0, 1.0]
    assert Sampler(SamplingParams(repetition_penalty=3.0)).next(logits, [0], []) == 2


def test_presence_and_frequency_count_the_answer_alone():
    logits = torch.tensor([[2.0, 1.9, 0.0]])
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    assert penalised(logits, [params], [[1, 1, 1]], [[0, 0]]).tolist() == [[1.0, pytest.approx(1.9), 0.0]]
    assert Sampler(params).next(logits[0], [1, 1], [0]) == 1
    assert Sampler(params).next(logits[0], [0, 0], []) == 0


@pytest.mark.parametrize("chance", [0.0, 0.25, 0.5, 1 - 2**-53])
def test_a_draw_meets_the_id_where_the_sum_passes_the_chance_and_none_without_weight(chance):
    weights = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    assert int(draw(weights, torch.tensor([chance], dtype=torch.float64))) == (1 if chance < 0.25 else 3)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from(MIXED), min_size=1, max_size=5), st.integers(0, 99))
def test_rows_drawn_together_are_those_drawn_alone(mix, seed):
    logits = torch.randn(len(mix), 50, generator=torch.Generator().manual_seed(seed)) * 3
    past = [[1, 2, 3], [4, 5]]
    together = next_ids(logits, [Sampler(p) for p in mix], [past[0]] * len(mix), [past[1]] * len(mix))
    assert together == [Sampler(p).next(row, *past) for p, row in zip(mix, logits, strict=True)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.0),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", float("nan")),
        ("max_tokens", 0),
        ("seed", -1),
        ("stop", ("",)),
    ],
)
def test_a_setting_out_of_range_is_refused_with_name_and_value(field, value):
    with pytest.raises(ConfigError, match=f"{field} is .*must be"):
        SamplingParams(**{field: value})
