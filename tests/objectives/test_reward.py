"""The reward model's loss equals Bradley and Terry's formula in plain numbers, with a margin and with centring."""

from math import exp, log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from luthier.objectives.loss import Loss
from luthier.objectives.reward import bradley_terry, stepwise

rewards = st.floats(-20, 20)
pairs = st.lists(st.tuples(rewards, rewards), min_size=1, max_size=5)


def loss_of(pairs: list[tuple[float, float]], margins: list[float] | None = None, *, center: float = 0.0) -> Loss:
    values = torch.tensor(pairs, dtype=torch.float64).flatten()
    told = None if margins is None else torch.tensor(margins, dtype=torch.float64)
    return bradley_terry(values, torch.arange(len(values)).view(-1, 2), margins=told, center=center)


def gradient(rewards: Tensor, **settings: float) -> Tensor:
    rewards = rewards.clone().requires_grad_()
    bradley_terry(rewards, torch.arange(len(rewards)).view(-1, 2), **settings).per_unit.sum().backward()
    assert rewards.grad is not None
    return rewards.grad


@given(pairs, st.sampled_from([0.0, 0.5, 3.0]), st.sampled_from([0.0, 0.01, 1.0]))
def test_a_pair_costs_minus_the_log_of_its_probability(
    pairs: list[tuple[float, float]], margin: float, center: float
) -> None:
    """P(chosen beats rejected) = exp(a) / (exp(a) + exp(b)), a lessened by the margin; and center (a + b)^2."""
    expected = []
    for a, b in pairs:
        probability = exp(a - margin) / (exp(a - margin) + exp(b))
        expected.append(-log(probability) + center * (a + b) ** 2)
    loss = loss_of(pairs, [margin] * len(pairs), center=center)
    assert loss.unit == "pairs"
    assert loss.per_unit.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(pairs)
def test_no_margin_is_a_margin_of_zero(pairs: list[tuple[float, float]]) -> None:
    torch.testing.assert_close(loss_of(pairs).per_unit, loss_of(pairs, [0.0] * len(pairs)).per_unit)


@given(pairs, st.floats(-5, 5))
def test_only_differences_of_rewards_count_unless_they_are_centred(
    pairs: list[tuple[float, float]], shift: float
) -> None:
    moved = [(a + shift, b + shift) for a, b in pairs]
    torch.testing.assert_close(loss_of(moved).per_unit, loss_of(pairs).per_unit, rtol=1e-9, atol=1e-9)


def test_centring_alone_draws_the_mean_of_a_pair_to_zero() -> None:
    """Two answers with the reward 3: the gradient of 0.01 (a + b)^2 is 0.02 * 6 in each, beside -1/2 and 1/2."""
    found = gradient(torch.tensor([3.0, 3.0], dtype=torch.float64), center=0.01)
    assert found.tolist() == pytest.approx([-0.5 + 0.12, 0.5 + 0.12])


def test_a_pair_without_a_difference_costs_log_two() -> None:
    assert loss_of([(3.0, 3.0)]).per_unit.tolist() == pytest.approx([log(2)])


def test_any_reward_gives_finite_losses_and_gradients() -> None:
    """In float32, up to rewards of 1e4."""
    extremes = torch.tensor([(a, b) for a in (-1e4, 0.0, 1e4) for b in (-1e4, 1e-6, 1e4)]).flatten()
    loss = bradley_terry(extremes, torch.arange(len(extremes)).view(-1, 2), center=0.01)
    assert bool(loss.per_unit.isfinite().all())
    assert bool(gradient(extremes, center=0.01).isfinite().all())


def test_each_pair_of_a_ranking_counts() -> None:
    """Rewards 2, 1 and 3 of answers ranked in this order: one pair of three is right."""
    loss = bradley_terry(torch.tensor([2.0, 1.0, 3.0]), torch.tensor([[0, 1], [0, 2], [1, 2]]))
    expected = [log(1 + exp(-1)), log(1 + exp(1)), log(1 + exp(2))]
    assert loss.per_unit.tolist() == pytest.approx(expected)
    assert loss.kept["rewards/accuracies"].tolist() == [1.0, 3.0]


def test_pairs_are_told_of_by_the_usual_names() -> None:
    """Equal rewards are not right; margins are the rewards' own, whatever margin is asked for."""
    told = loss_of([(2.0, 1.0), (-1.0, -1.0)], [5.0, 5.0]).kept
    assert {name: value.tolist() for name, value in told.items()} == {
        **{"rewards/chosen": [1.0, 2.0], "rewards/rejected": [0.0, 2.0]},
        **{"rewards/margins": [1.0, 2.0], "rewards/accuracies": [1.0, 2.0]},
    }


def test_a_steps_loss_is_the_cross_entropy_of_its_label() -> None:
    rewards = torch.tensor([2.0, -1.0, 0.5, -40.0, 40.0], dtype=torch.float64, requires_grad=True)
    correct = torch.tensor([True, True, False, False, True])
    loss = stepwise(rewards, correct)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(rewards, correct.double(), reduction="none")
    torch.testing.assert_close(loss.per_unit, expected, rtol=0, atol=1e-12)
    assert loss.unit == "tokens"
    total, number = loss.kept["rewards/correct"].tolist()
    assert (total, number) == (pytest.approx(2.0 - 1.0 + 40.0), 3)
    assert loss.kept["rewards/accuracies"].tolist() == [3.0, 5.0]
