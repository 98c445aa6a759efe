"""sampling.py: greedy is the likeliest id, a seed repeats, and each filter keeps what it says."""

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tessella.errors import ConfigError
from tessella.sampling import GREEDY, Sampler, SamplingParams, penalise, probabilities

LOGITS = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
rows = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=50).map(torch.tensor)


def kept(logits: torch.Tensor, **fields: float) -> list[int]:
    return probabilities(logits, SamplingParams(temperature=1.0, **fields)).nonzero().flatten().tolist()


def drawn(params: SamplingParams, count: int = 40, logits: torch.Tensor | None = None) -> list[int]:
    sampler = Sampler(params)
    return [sampler.next(torch.zeros(1000) if logits is None else logits, []) for _ in range(count)]


@settings(deadline=None)
@given(rows)
def test_greedy_takes_the_likeliest(logits):
    assert Sampler(GREEDY).next(logits, []) == int(logits.argmax())


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
    p = probabilities(logits, SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p))
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    assert p[logits.argmax()] == p.max() > 0
    assert top_k == 0 or int((p > 0).sum()) <= top_k


def test_temperature_flattens_and_sharpens():
    cold = probabilities(LOGITS, SamplingParams(temperature=0.5))
    assert torch.allclose(cold, torch.tensor([16.0, 9, 4, 1]) / 30)
    assert torch.allclose(probabilities(LOGITS, SamplingParams(temperature=1e-30)), torch.tensor([1.0, 0, 0, 0]))


def test_the_repetition_penalty_lowers_what_was_seen_and_spares_the_input():
    logits = torch.tensor([2.0, -2.0, 1.0])
    assert penalise(logits, [0, 1, 1], 2.0).tolist() == [1.0, -4.0, 1.0]
    assert logits.tolist() == [2.0, -2.0, 1.0]
    assert Sampler(SamplingParams(repetition_penalty=3.0)).next(logits, [0]) == 2


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
        ("max_tokens", 0),
        ("seed", -1),
        ("stop", ("",)),
    ],
)
def test_a_setting_out_of_range_is_refused_with_name_and_value(field, value):
    with pytest.raises(ConfigError, match=f"{field} is .*must be"):
        SamplingParams(**{field: value})
