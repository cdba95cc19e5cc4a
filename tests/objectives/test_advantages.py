"""Advantages equal their papers' formulas, written here once more as plain loops in float64, and keep their laws."""

from math import isnan, nan
from statistics import mean, stdev

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from luthier.objectives.advantages import (
    adapted_kl_weight,
    carries_signal,
    gae,
    group_advantages,
    returns_to_go,
    soft_length_penalty,
    token_rewards,
    whitened,
)

Answer = list[tuple[float, float]]  # of each token its reward and its value

number = st.floats(-5, 5)
scored = st.tuples(st.one_of(st.just(nan), number.map(lambda x: round(x, 2))), st.integers(0, 3))
scores = st.lists(scored, min_size=1, max_size=12)
answers = st.lists(st.lists(st.tuples(number, number), max_size=7), min_size=1, max_size=5)
discounts = st.sampled_from([0.0, 0.5, 0.95, 1.0])

SCALED = [
    *(("group_mean", scale) for scale in ("group_std", "batch_std", "none")),
    *(("leave_one_out", scale) for scale in ("group_std", "batch_std", "none")),
    *(("batch_mean", scale) for scale in ("batch_std", "none")),
    ("none", "none"),
]


def tensors(rows: list[tuple[float, int]]) -> tuple[Tensor, Tensor]:
    """Rewards and groups."""
    return torch.tensor([r for r, _ in rows], dtype=torch.float64), torch.tensor([g for _, g in rows])


def flat(answers: list[Answer]) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and the sequence of each token; answers without tokens leave a gap."""
    tokens = [(reward, value, i) for i, answer in enumerate(answers) for reward, value in answer]
    rewards, values, sequence = torch.tensor(tokens, dtype=torch.float64).view(-1, 3).T
    return rewards, values, sequence.long()


def by_hand(rows: list[tuple[float, int]], baseline: str, scale: str) -> list[float]:
    """Answer by answer, with Python's own statistics; 0 where it is not scored, or no two differ of those that make its
    baseline.
    """
    everything = [r for r, _ in rows if not isnan(r)]
    found = []
    for number, (reward, group) in enumerate(rows):
        own = [r for r, g in rows if g == group and not isnan(r)]
        peers = everything if baseline == "batch_mean" else own
        if isnan(reward) or (baseline != "none" and len(set(peers)) < 2):
            found.append(0.0)
            continue
        others = [r for i, (r, g) in enumerate(rows) if g == group and i != number and not isnan(r)]
        expected = {"leave_one_out": others, "none": [0.0]}.get(baseline, peers)
        deviation = {"none": 1.0}.get(scale) or stdev(own if scale == "group_std" else everything) + 1e-4
        found.append((reward - mean(expected)) / deviation)
    return found


@pytest.mark.parametrize(("baseline", "scale"), SCALED)
@given(scores)
def test_advantages_of_groups_equal_plain_statistics(baseline: str, scale: str, rows: list[tuple[float, int]]) -> None:
    found = group_advantages(*tensors(rows), baseline=baseline, scale=scale)
    assert found.tolist() == pytest.approx(by_hand(rows, baseline, scale), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("baseline", "scale"), SCALED)
@given(scores, st.integers(0, 3))
def test_an_answer_without_a_score_changes_nothing(
    baseline: str, scale: str, rows: list[tuple[float, int]], group: int
) -> None:
    alone = group_advantages(*tensors(rows), baseline=baseline, scale=scale)
    beside = group_advantages(*tensors([*rows, (nan, group)]), baseline=baseline, scale=scale)
    assert beside.tolist() == pytest.approx([*alone.tolist(), 0.0], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("baseline", "scale"), [row for row in SCALED if row[0] in ("group_mean", "leave_one_out")])
@given(scores)
def test_a_groups_advantages_sum_to_nothing(baseline: str, scale: str, rows: list[tuple[float, int]]) -> None:
    """To 1e-8, for rewards that differ by 0.01 may be divided by 1e-4."""
    rewards, groups = tensors(rows)
    found = group_advantages(rewards, groups, baseline=baseline, scale=scale)
    sums = torch.zeros(4, dtype=torch.float64).index_add(0, groups, found)
    torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-8)


@given(st.lists(number, min_size=2, max_size=8))
def test_leaving_one_out_is_the_centred_reward_times_n_over_n_less_one(rewards: list[float]) -> None:
    """r - (S - r) / (n - 1) = (n r - S) / (n - 1) = n / (n - 1) (r - S / n)."""
    given_to = tensors([(reward, 0) for reward in rewards])
    centred, without = (group_advantages(*given_to, baseline=b, scale="none") for b in ("group_mean", "leave_one_out"))
    torch.testing.assert_close(without, centred * len(rewards) / (len(rewards) - 1))


@pytest.mark.parametrize(("baseline", "scale"), SCALED[:-1])
def test_equal_rewards_move_nothing_at_all(baseline: str, scale: str) -> None:
    """Exactly: the mean of seven 0.1 is not 0.1 in float32, and what is left of it would be divided by 1e-4."""
    rewards = torch.full((7,), 0.1)
    assert bool((rewards != rewards.mean()).any())
    found = group_advantages(rewards, torch.zeros(7, dtype=torch.long), baseline=baseline, scale=scale)
    assert found.tolist() == [0.0] * 7


@pytest.mark.parametrize(
    ("baseline", "scale"), [("none", "batch_std"), ("none", "group_std"), ("batch_mean", "group_std")]
)
def test_a_scale_that_would_divide_another_remainder_is_refused(baseline: str, scale: str) -> None:
    with pytest.raises(AssertionError, match="does not divide"):
        group_advantages(torch.ones(2), torch.tensor([0, 1]), baseline=baseline, scale=scale)


@given(scores)
def test_a_group_carries_a_signal_where_two_rewards_differ(rows: list[tuple[float, int]]) -> None:
    found = carries_signal(*tensors(rows)).tolist()
    assert len(found) == max(group for _, group in rows) + 1
    for group, signal in enumerate(found):
        assert signal == (len({r for r, g in rows if g == group and not isnan(r)}) > 1)


def test_no_answers_are_no_groups() -> None:
    none = torch.zeros(0)
    assert carries_signal(none, none.long()).tolist() == []
    assert group_advantages(none, none.long(), baseline="group_mean", scale="group_std").tolist() == []


@given(answers, discounts, discounts)
def test_generalized_advantages_equal_a_loop(answers: list[Answer], gamma: float, lam: float) -> None:
    """Backwards, A_t = d_t + gamma lam A_{t+1}        Schulman et al. 2016, eq. 16 with d_t of eq. 10"""
    expected = []
    for answer in answers:
        advantages, advantage, following = [], 0.0, 0.0
        for reward, value in reversed(answer):
            advantage = reward + gamma * following - value + gamma * lam * advantage
            following = value
            advantages.append((advantage, advantage + value))
        expected += reversed(advantages)
    found = gae(*flat(answers), gamma=gamma, lam=lam)
    torch.testing.assert_close(torch.stack(found, 1), torch.tensor(expected, dtype=torch.float64).view(-1, 2))


@given(answers, discounts)
def test_generalized_advantages_lie_between_one_step_and_all(answers: list[Answer], gamma: float) -> None:
    """Schulman et al. 2016, eqs. 17 and 18: at lambda 0 the temporal difference, at 1 the return less the value."""
    rewards, values, sequence = flat(answers)
    following = [v for answer in answers if answer for v in [*[v for _, v in answer[1:]], 0.0]]
    one_step, _ = gae(rewards, values, sequence, gamma=gamma, lam=0.0)
    torch.testing.assert_close(one_step, rewards + gamma * values.new_tensor(following) - values)
    to_the_end, returns = gae(rewards, values, sequence, gamma=gamma, lam=1.0)
    torch.testing.assert_close(to_the_end, returns_to_go(rewards, sequence, gamma=gamma) - values)
    torch.testing.assert_close(returns, returns_to_go(rewards, sequence, gamma=gamma))


@given(answers, answers, discounts)
def test_an_answers_advantages_do_not_depend_on_its_neighbours(
    some: list[Answer], more: list[Answer], lam: float
) -> None:
    apart = [gae(*flat(part), gamma=0.9, lam=lam)[0] for part in (some, more)]
    torch.testing.assert_close(gae(*flat(some + more), gamma=0.9, lam=lam)[0], torch.cat(apart))


def test_returns_of_a_long_answer_equal_their_closed_form() -> None:
    """Of rewards 1, (1 - gamma^n) / (1 - gamma) with n tokens to go."""
    to_go = torch.arange(5000, 0, -1, dtype=torch.float64)
    found = returns_to_go(torch.ones(5000, dtype=torch.float64), torch.zeros(5000, dtype=torch.long), gamma=0.999)
    torch.testing.assert_close(found, (1 - 0.999**to_go) / (1 - 0.999))


@given(answers, st.floats(0, 1))
def test_rewards_of_tokens_are_the_kls_price_and_at_the_end_the_score(answers: list[Answer], weight: float) -> None:
    kl, _, sequence = flat(answers)
    given_scores = torch.arange(1.0, len(answers) + 1, dtype=torch.float64)
    found = token_rewards(given_scores, kl, sequence, kl_weight=weight).tolist()
    expected = []
    for score, answer in zip(given_scores.tolist(), answers, strict=True):
        priced = [-weight * each for each, _ in answer]
        expected += [*priced[:-1], priced[-1] + score] if priced else []
    assert found == pytest.approx(expected)


def test_the_score_of_an_answer_without_tokens_is_not_read() -> None:
    found = token_rewards(torch.tensor([1.0, nan, 3.0]), torch.zeros(3), torch.tensor([0, 0, 2]), kl_weight=0.1)
    assert found.tolist() == [0.0, 1.0, 3.0]


@given(answers, st.floats(0, 1))
def test_reinforce_plus_plus_has_returns_to_go_of_the_score_less_the_kl(answers: list[Answer], weight: float) -> None:
    """Hu et al. 2025: A_t = score - beta sum_{i >= t} KL_i, then less its mean and divided by its deviation over all
    tokens; the 1e-8 in the divisor is small against deviations of more than 0.1.
    """
    kl, _, sequence = flat(answers)
    given_scores = torch.arange(len(answers), dtype=torch.float64)
    expected = [
        float(i) - weight * sum(each for each, _ in answer[t:])
        for i, answer in enumerate(answers)
        for t in range(len(answer))
    ]
    assume(len(expected) > 1)
    assume(stdev(expected) > 0.1)
    rewards = token_rewards(given_scores, kl, sequence, kl_weight=weight)
    found = whitened(returns_to_go(rewards, sequence, gamma=1.0)).tolist()
    center, deviation = mean(expected), stdev(expected)
    assert found == pytest.approx([(each - center) / deviation for each in expected], rel=1e-5, abs=1e-5)


varied = st.lists(number, min_size=2, max_size=20).filter(lambda values: stdev(values) > 0.1)


@given(varied, st.floats(0.5, 1e4), st.floats(-100, 100))
def test_whitening_forgets_scale_and_shift(values: list[float], factor: float, shift: float) -> None:
    """To 1e-5: the 1e-8 beside a variance of at least 0.0025 is 4e-6 of it."""
    given_values = torch.tensor(values, dtype=torch.float64)
    white = whitened(given_values)
    assert (float(white.mean()), float(white.var())) == pytest.approx((0.0, 1.0), abs=1e-5)
    torch.testing.assert_close(whitened(factor * given_values + shift), white, rtol=1e-5, atol=1e-5)


@given(varied)
def test_whitened_rewards_can_keep_their_mean(values: list[float]) -> None:
    given_values = torch.tensor(values, dtype=torch.float64)
    kept = whitened(given_values, keep_mean=True)
    torch.testing.assert_close(kept - kept.mean(), whitened(given_values))
    torch.testing.assert_close(kept.mean(), given_values.mean())


def test_a_single_value_is_white_already() -> None:
    assert whitened(torch.tensor([3.0])).tolist() == [0.0]
    assert whitened(torch.tensor([3.0]), keep_mean=True).tolist() == [3.0]


@pytest.mark.parametrize(
    ("length", "penalty"), [(0, 0.0), (80, 0.0), (85, -0.25), (90, -0.5), (100, -1.0), (101, -1.0), (1000, -1.0)]
)
def test_an_answer_is_charged_for_the_margin_that_it_takes(length: int, penalty: float) -> None:
    """Yu et al. 2025, DAPO, eq. 13 with L_max = 100 and L_cache = 20."""
    assert soft_length_penalty(torch.tensor([length]), longest=100, margin=20).tolist() == [penalty]


@pytest.mark.parametrize(("kl", "factor"), [(6.0, 1.0), (6.6, 1.005), (60.0, 1.01), (5.4, 0.995), (0.0, 0.99)])
def test_the_kls_price_follows_its_target(kl: float, factor: float) -> None:
    """500 answers of a horizon of 10,000 move it by a twentieth of the error, which is clipped at a fifth."""
    found = adapted_kl_weight(0.2, kl=kl, target=6.0, num_answers=500, horizon=10_000)
    assert found == pytest.approx(0.2 * factor)


def test_the_kls_price_changes_by_a_fifth_in_a_horizon() -> None:
    found = adapted_kl_weight(1.0, kl=100.0, target=1.0, num_answers=10_000, horizon=10_000)
    assert found == pytest.approx(1.2)


@given(scores)
def test_the_order_of_answers_does_not_matter(rows: list[tuple[float, int]]) -> None:
    """Groups need not lie together."""
    found = group_advantages(*tensors(rows), baseline="group_mean", scale="group_std")
    order = sorted(range(len(rows)), key=lambda i: rows[i][1])
    together = group_advantages(*tensors([rows[i] for i in order]), baseline="group_mean", scale="group_std")
    torch.testing.assert_close(together, found[order])
