"""Draws follow the probabilities that transformers' warpers leave; log-probabilities are those before them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from luthier.rollout.choice import FEW, choose, penalized
from luthier.rollout.requests import Sampling

CUTS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.7),
    Sampling(temperature=1.0, top_k=3),
    Sampling(temperature=1.3, top_p=0.8),
    Sampling(temperature=1.0, min_p=0.2),
    Sampling(temperature=0.9, top_k=6, top_p=0.9, min_p=0.1),
]
NEARLY_ONE = float(np.nextafter(np.float32(1), np.float32(0)))


def random_logits(seed: int, *shape: int, scale: float = 1.5) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32))


def warped(logits: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities that transformers draws from."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return torch.softmax(warpers(torch.zeros(len(logits), 1, dtype=torch.int64), logits.clone()), -1)


def frequencies(logits: Tensor, sampling: Sampling, num_draws: int) -> Tensor:
    """How often each token is drawn, over an even grid of uniforms. logits: [vocabulary]."""
    grid = (torch.arange(num_draws) + 0.5) / num_draws
    tokens, _ = choose(logits.repeat(num_draws, 1), grid, sampling)
    return torch.bincount(tokens, minlength=len(logits)) / num_draws


@pytest.mark.parametrize("sampling", CUTS, ids=str)
def test_tokens_are_drawn_as_often_as_they_are_probable(sampling: Sampling) -> None:
    """A token owns an interval of the unit line as long as its probability, and a grid of 10,000 hits an interval as
    often as its length says, but for one hit at either end.
    """
    logits = random_logits(0, 9)
    found = frequencies(logits, sampling, 10_000)
    torch.testing.assert_close(found, warped(logits[None], sampling)[0], rtol=0, atol=2e-4)


@given(
    seed=st.integers(0, 10**6),
    size=st.integers(2, 12),
    temperature=st.floats(0.5, 2),
    top_k=st.integers(0, 14),
    top_p=st.floats(0.05, 1),
    min_p=st.one_of(st.just(0.0), st.floats(0.01, 1)),
)
def test_what_the_cuts_leave_is_what_transformers_warpers_leave(
    seed: int, size: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """No token from outside the support is drawn, and each as often as it is probable, but for two draws of 4,000."""
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = 3 * torch.tanh(random_logits(seed, size) / 3)  # bounded, and no two alike
    expected, found = warped(logits[None], sampling)[0], frequencies(logits, sampling, 4000)
    assert not found[expected == 0].any()
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-4)


@pytest.mark.parametrize("scale", [0.1, 4.0])
def test_a_flat_distribution_needs_more_candidates_than_are_looked_at_first(scale: float) -> None:
    """Of 900 nearly equal logits, 90% take some 800; of unequal ones fewer than the first look. To two draws."""
    sampling, logits = Sampling(temperature=1.0, top_p=0.9), random_logits(1, 900, scale=scale)
    left = warped(logits[None], sampling)[0]
    assert bool((left > 0).sum() > FEW) == (scale < 1)
    found = frequencies(logits, sampling, 8000)
    assert not found[left == 0].any()
    torch.testing.assert_close(found, left, rtol=0, atol=2.5e-4)


@pytest.mark.parametrize("sampling", [*CUTS, Sampling(), Sampling(temperature=1.0, top_p=0.95)], ids=str)
def test_a_rows_draw_does_not_depend_on_its_neighbours(sampling: Sampling) -> None:
    """Exactly, though a flat neighbour makes all candidates be looked at."""
    logits, uniforms = random_logits(2, 40, 800, scale=4.0), torch.rand(40, generator=torch.Generator().manual_seed(0))
    logits[::2] *= 0.01
    tokens, logprobs = choose(logits.clone(), uniforms, sampling)
    alone = [choose(row[None].clone(), u[None], sampling) for row, u in zip(logits, uniforms, strict=True)]
    assert torch.equal(tokens, torch.cat([token for token, _ in alone]))
    assert torch.equal(logprobs, torch.cat([logprob for _, logprob in alone]))


@pytest.mark.parametrize("sampling", [*CUTS, Sampling()], ids=str)
@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_log_probabilities_are_those_before_anything_is_cut(sampling: Sampling, penalty: float) -> None:
    logits, seen = random_logits(3, 50, 30), random_logits(4, 50, 30) > 0
    sampling = Sampling(
        **{name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p")},
        repetition_penalty=penalty,
    )
    uniforms = torch.rand(50, generator=torch.Generator().manual_seed(1))
    tokens, logprobs = choose(logits.clone(), uniforms, sampling, None if penalty == 1 else seen)
    expected = torch.log_softmax(logits / (sampling.temperature or 1), -1).gather(-1, tokens[:, None]).squeeze(-1)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("sampling", CUTS, ids=str)
@pytest.mark.parametrize("uniform", [0.0, NEARLY_ONE, 1.0])
def test_what_has_no_probability_is_never_drawn(sampling: Sampling, uniform: float) -> None:
    """1 is what a float64 just below it is rounded to. The impossible tokens stand first, last and between, of few
    tokens and of so many that the rounded probabilities add up to less or more than 1.
    """
    for size in (5, 4000):
        logits = random_logits(5, 200, size, scale=1.0)
        impossible = torch.zeros(size, dtype=torch.bool)
        impossible[[0, 2, size - 2, size - 1]] = True
        logits[:, impossible] = -torch.inf
        tokens, logprobs = choose(logits, torch.full((200,), uniform), sampling)
        assert not impossible[tokens].any()
        assert logprobs.isfinite().all()


def test_the_penalty_is_transformers_own() -> None:
    ids = torch.tensor([[0, 3, 3, 1], [2, 2, 2, 2]])
    logits = torch.tensor([[1.0, -1.0, 2.0, 0.0, 5.0], [3.0, 3.0, -3.0, 1.0, 0.5]])
    seen = torch.zeros(2, 5, dtype=torch.bool).scatter_(1, ids, True)
    assert torch.equal(penalized(logits, seen, 1.3), RepetitionPenaltyLogitsProcessor(1.3)(ids, logits))


def test_penalized_tokens_are_drawn_as_often_as_transformers_draws_them() -> None:
    """The penalty before the temperature, then the cuts of what it leaves."""
    sampling = Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.9)
    logits, ids = random_logits(6, 1, 9), torch.tensor([[0, 4, 4, 7]])
    seen = torch.zeros(1, 9, dtype=torch.bool).scatter_(1, ids, True)
    expected = warped(RepetitionPenaltyLogitsProcessor(1.9)(ids, logits), sampling)[0]
    assert not torch.allclose(expected, warped(logits, sampling)[0], atol=0.02)
    grid = (torch.arange(10_000) + 0.5) / 10_000
    tokens, _ = choose(logits.repeat(10_000, 1), grid, sampling, seen.repeat(10_000, 1))
    torch.testing.assert_close(torch.bincount(tokens, minlength=9) / 10_000, expected, rtol=0, atol=2e-4)


def test_greedy_takes_the_largest_whatever_the_uniform_and_after_the_penalty() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.9], [5.0, -1.0, 0.0]])
    for uniform in (0.0, 0.5, NEARLY_ONE):
        assert choose(logits.clone(), torch.full((2,), uniform), Sampling())[0].tolist() == [1, 0]
    seen = torch.tensor([[False, True, False], [False, False, False]])
    assert choose(logits, torch.zeros(2), Sampling(repetition_penalty=2.0), seen)[0].tolist() == [2, 0]


@pytest.mark.parametrize("sampling", [*CUTS, Sampling()], ids=str)
def test_logits_that_are_not_numbers_say_so_and_spoil_no_other_row(sampling: Sampling) -> None:
    logits = random_logits(7, 3, 20)
    expected = choose(logits.clone(), torch.full((3,), 0.4), sampling)
    logits[1, 4] = torch.nan
    tokens, logprobs = choose(logits, torch.full((3,), 0.4), sampling)
    assert logprobs.isnan().tolist() == [False, True, False]
    assert 0 <= int(tokens[1]) < 20
    assert torch.equal(tokens[::2], expected[0][::2])
    assert torch.equal(logprobs[::2], expected[1][::2])
