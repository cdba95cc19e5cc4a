"""The policy objective equals its methods' papers, written here once more as loops over plain numbers; and its laws."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import exp, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from luthier.objectives.loss import Loss
from luthier.objectives.policy import (
    KL_ESTIMATES,
    Rollouts,
    Surrogate,
    Values,
    kl_estimates,
    policy_gradient,
    value_loss,
)


@dataclass(frozen=True)
class Token:
    """log p now, before the first update, by the reference and by the engine; and what is expected of it."""

    now: float
    old: float
    reference: float
    sampled: float
    advantage: float
    entropy: float
    value: float
    old_value: float
    returned: float

    @property
    def ratio(self) -> float:
        return exp(self.now - self.old)

    @property
    def k3(self) -> float:
        d = self.reference - self.now
        return exp(d) - d - 1


Answer = list[Token]


def clipped(ratio: float, advantage: float, low: float, high: float) -> float:
    """What PPO loses, Schulman et al. 2017, eq. 7."""
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def of_values(t: Token) -> float:
    near = t.old_value + min(max(t.value - t.old_value, -0.2), 0.2)
    return 0.5 * max((t.value - t.returned) ** 2, (near - t.returned) ** 2)


def value_is_clipped(t: Token) -> bool:
    return abs(t.value - t.old_value) > 0.2 and of_values(t) > 0.5 * (t.value - t.returned) ** 2


def over_tokens(answers: list[Answer], loss: Callable[[Token], float]) -> float:
    tokens = [token for answer in answers for token in answer]
    return sum(map(loss, tokens)) / len(tokens)


def over_answers(answers: list[Answer], loss: Callable[[Answer], float]) -> float:
    return sum(loss(answer) for answer in answers if answer) / len(answers)


def gspo(answer: Answer) -> float:
    """Zheng et al. 2025, eqs. 5 and 7: one ratio and one advantage an answer."""
    ratio = exp(sum(t.now - t.old for t in answer) / len(answer))
    return clipped(ratio, answer[0].advantage, 3e-4, 4e-4)


# A step's loss by each paper: PPO's eq. 9; GRPO's eq. 3 with eq. 4; Dr. GRPO's section 3.2; DAPO's eq. 8; RLOO's is
# REINFORCE's of whole answers; REINFORCE++'s is PPO's without a value head, and differs in its advantages.
PAPERS: dict[str, Callable[[list[Answer]], float]] = {
    "ppo": lambda answers: over_tokens(
        answers, lambda t: clipped(t.ratio, t.advantage, 0.2, 0.2) + 0.1 * of_values(t) - 0.01 * t.entropy
    ),
    "grpo": lambda answers: over_answers(
        answers, lambda a: sum(clipped(t.ratio, t.advantage, 0.2, 0.2) + 0.04 * t.k3 for t in a) / len(a)
    ),
    "dr_grpo": lambda answers: over_answers(
        answers, lambda a: sum(clipped(t.ratio, t.advantage, 0.2, 0.2) for t in a) / 64
    ),
    "dapo": lambda answers: over_tokens(answers, lambda t: clipped(t.ratio, t.advantage, 0.2, 0.28)),
    "gspo": lambda answers: over_answers(answers, gspo),
    "rloo": lambda answers: over_answers(answers, lambda a: -a[0].advantage * sum(t.now for t in a)),
    "reinforce_plus_plus": lambda answers: over_tokens(answers, lambda t: clipped(t.ratio, t.advantage, 0.2, 0.2)),
}
CLIP = {"clip_low": 0.2, "clip_high": 0.2}
METHODS = {
    "ppo": Surrogate("token", "tokens", **CLIP, value_weight=0.1, value_clip=0.2, entropy_weight=0.01),
    "grpo": Surrogate("token", "sequences", **CLIP, kl_weight=0.04),
    "dr_grpo": Surrogate("token", "constant", **CLIP, length=64),
    "dapo": Surrogate("token", "tokens", clip_low=0.2, clip_high=0.28),
    "gspo": Surrogate("sequence", "sequences", clip_low=3e-4, clip_high=4e-4),
    "rloo": Surrogate("none", "sum"),
    "reinforce_plus_plus": Surrogate("token", "tokens", **CLIP),
}
# Every term at once.
TERMS = {"kl_weight": 0.1, "entropy_weight": 0.02, "importance_cap": 2.0, "value_weight": 0.1, "value_clip": 0.2}
WHOLE = {name: replace(method, **TERMS, kl_corrected=name not in ("grpo", "rloo")) for name, method in METHODS.items()}

# One advantage an answer, as methods without a value head have it; log-ratios within and beyond the clipped region.
nats, shift, number = st.floats(-3, -0.01), st.floats(-0.6, 0.6), st.floats(-2, 2)
token = st.builds(
    lambda now, old, reference, sampled, entropy, value, old_value, returned: Token(
        now, now + old, now + reference, now + sampled, 0.0, entropy, value, old_value, returned
    ),
    *(nats, shift, shift, shift, st.floats(0, 3), number, number, number),
)
answer = st.tuples(number, st.lists(token, max_size=5)).map(lambda a: [replace(t, advantage=a[0]) for t in a[1]])
steps = st.lists(answer, min_size=1, max_size=5).filter(any)


def rollouts_of(answers: list[Answer], dtype: torch.dtype = torch.float64) -> Rollouts:
    tokens = [token for answer in answers for token in answer]
    told = {name: torch.tensor([getattr(t, name) for t in tokens], dtype=dtype) for name in Token.__dataclass_fields__}
    lengths = torch.tensor([len(answer) for answer in answers])
    return Rollouts(
        logprobs=told["now"].requires_grad_(),
        advantages=told["advantage"],
        sequence=torch.arange(len(answers)).repeat_interleave(lengths),
        num_sequences=len(answers),
        old=told["old"],
        sampled=told["sampled"],
        reference=told["reference"],
        entropy=told["entropy"].requires_grad_(),
        values=Values(told["value"].requires_grad_(), told["old_value"], told["returned"]),
    )


def gradient(loss: Loss, rollouts: Rollouts) -> Tensor:
    """Of the sum of the losses in the log-probabilities, [targets]."""
    (found,) = torch.autograd.grad(loss.per_unit.sum(), rollouts.logprobs)
    return found


def total(loss: Loss) -> float:
    return float(loss.per_unit.detach().sum())


def told(loss: Loss) -> dict[str, tuple[float, float]]:
    """Sum and number of each metric."""
    return {name: (float(added), float(number)) for name, (added, number) in loss.kept.items()}


def means(loss: Loss) -> dict[str, float]:
    return {name: added / number for name, (added, number) in told(loss).items()}


@pytest.mark.parametrize("name", PAPERS)
@given(steps)
def test_a_method_equals_its_papers_formula(name: str, answers: list[Answer]) -> None:
    rollouts = replace(rollouts_of(answers), sampled=None)
    loss = policy_gradient(rollouts, METHODS[name])
    assert loss.unit == ("tokens" if METHODS[name].aggregate == "tokens" else "sequences")
    assert len(loss.per_unit) == (len(rollouts.logprobs) if loss.unit == "tokens" else len(answers))
    assert total(loss) / len(loss.per_unit) == pytest.approx(PAPERS[name](answers), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", WHOLE)
@given(steps, st.integers(0, 5))
def test_a_step_cut_in_two_costs_and_teaches_the_same(name: str, answers: list[Answer], place: int) -> None:
    """And tells the same, sums with sums and numbers with numbers."""
    parts = [part for part in (answers[:place], answers[place:]) if any(part)]
    whole = rollouts_of(answers)
    loss = policy_gradient(whole, WHOLE[name])
    cut = [(rollouts, policy_gradient(rollouts, WHOLE[name])) for rollouts in map(rollouts_of, parts)]
    assert sum(total(part) for _, part in cut) == pytest.approx(total(loss))
    torch.testing.assert_close(
        torch.cat([gradient(part, rollouts) for rollouts, part in cut]), gradient(loss, whole), rtol=1e-9, atol=1e-12
    )
    for metric, (added, number) in told(loss).items():
        assert number == sum(told(part)[metric][1] for _, part in cut)
        assert added == pytest.approx(sum(told(part)[metric][0] for _, part in cut))


@pytest.mark.parametrize("name", METHODS)
@given(steps)
def test_the_first_update_is_plain_policy_gradient(name: str, answers: list[Answer]) -> None:
    """Without old log-probabilities all ratios are 1, and d exp(log p - log p_old) = d log p; of an answer's ratio too,
    whose tokens have one advantage.
    """
    aggregate = METHODS[name].aggregate
    rollouts = replace(rollouts_of(answers), old=None, sampled=None, values=None, reference=None, entropy=None)
    method = replace(METHODS[name], value_weight=0.0, entropy_weight=0.0, kl_weight=0.0)
    plain = Surrogate("none", aggregate, length=method.length)
    found, expected = (gradient(policy_gradient(rollouts, each), rollouts) for each in (method, plain))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", WHOLE)
def test_absurd_log_probabilities_cost_something_finite(name: str) -> None:
    """In float32, for log-ratios of up to ten thousand nats either way, in all places at once."""
    extremes = [-1e4, -100.0, -3.0, 0.0]
    tokens = [
        Token(now, old, reference, sampled, advantage, 1.0, 1e4, -1e4, 1.0)
        for now in extremes
        for old in extremes
        for reference in extremes
        for sampled in extremes
        for advantage in (-2.0, 2.0)
    ]
    rollouts = rollouts_of([tokens, [], tokens[:1]], torch.float32)
    for estimator in KL_ESTIMATES:
        loss = policy_gradient(rollouts, replace(WHOLE[name], kl_estimator=estimator))
        assert bool(loss.per_unit.isfinite().all())
        assert bool(gradient(loss, rollouts).isfinite().all())
        assert all(torch.isfinite(kept).all() for kept in loss.kept.values())


def test_far_from_the_reference_k3_still_pulls_towards_it() -> None:
    logprobs = torch.tensor([-1e4, -500.0, -30.0, 0.0, 0.0], requires_grad=True)
    reference = torch.tensor([0.0, 0.0, 0.0, -30.0, -1e4])
    kl_estimates(logprobs, reference, "k3").sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.sign().tolist() == [-1.0, -1.0, -1.0, 1.0, 1.0]


def test_a_bad_answer_that_became_absurdly_likely_is_still_pushed_down() -> None:
    rollouts = rollouts_of(
        [[Token(-1.0, -1.0 - far, 0.0, 0.0, -1.0, 0, 0, 0, 0) for far in (30.0, 1e4)]], torch.float32
    )
    assert bool((gradient(policy_gradient(rollouts, METHODS["reinforce_plus_plus"]), rollouts) > 0).all())


def test_a_corrected_kl_teaches_by_its_ratio_too() -> None:
    """Of r k1, with log p = -1, its reference -3 and r = e^0.5, the gradient is r k1 + r = 3 r."""
    rollouts = rollouts_of([[Token(-1.0, -1.5, -3.0, -1.0, 0.0, 0, 0, 0, 0)]])
    surrogate = Surrogate("token", "tokens", kl_weight=1.0, kl_estimator="k1", kl_corrected=True)
    loss = policy_gradient(rollouts, surrogate)
    assert loss.per_unit.tolist() == pytest.approx([2 * exp(0.5)])
    assert gradient(loss, rollouts).tolist() == pytest.approx([3 * exp(0.5)])


def test_a_value_that_has_hardly_moved_is_not_clipped() -> None:
    """Though 0.0625 + (0.00001 - 0.0625) rounds to more than 0.00001, and so to a larger error."""
    token = Token(-1.0, -1.0, -1.0, -1.0, 0.0, 0.0, 1e-5, 0.0625, 0.0)
    assert means(policy_gradient(rollouts_of([[token]]), WHOLE["ppo"]))["val/clipfrac_avg"] == 0


@pytest.mark.parametrize("aggregate", ["sequences", "constant", "sum"])
def test_an_answer_without_tokens_costs_nothing(aggregate: str) -> None:
    token = Token(-1.0, -1.5, -2.0, -1.0, 1.0, 0.5, 1.0, 0.5, 0.0)
    loss = policy_gradient(rollouts_of([[], [token], [], []]), Surrogate("sequence", aggregate, length=8, **TERMS))
    assert (loss.per_unit != 0).tolist() == [False, True, False, False]


@given(st.lists(st.floats(-4, 4), min_size=2, max_size=6), st.lists(st.floats(-4, 4), min_size=6, max_size=6))
def test_estimates_have_the_kl_as_their_mean_and_k2_its_gradient(logits: list[float], other: list[float]) -> None:
    """Exactly, summed over all tokens. A loss of samples has the gradient of sum p f(log p) at fixed p: that is the
    KL's for k2 and nothing for k1; and times the ratio p / p it is the KL's for k1 and k3.
    """
    free = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    p, q = free.log_softmax(0), torch.tensor(other[: len(logits)], dtype=torch.float64).log_softmax(0)
    kl = (p.exp() * (p - q)).sum()
    (expected,) = torch.autograd.grad(kl, free, retain_graph=True)
    for name in ("k1", "k3"):
        torch.testing.assert_close((p.exp() * kl_estimates(p, q, name)).sum(), kl, rtol=1e-9, atol=1e-12)
    ratios = (p - p.detach()).exp()
    nothing = torch.zeros_like(expected)
    for name, weights, its in (
        ("k2", 1, expected),
        ("k1", 1, nothing),
        ("k1", ratios, expected),
        ("k3", ratios, expected),
    ):
        mean = (p.detach().exp() * weights * kl_estimates(p, q, name)).sum()
        (found,) = torch.autograd.grad(mean, free, retain_graph=True)
        torch.testing.assert_close(found, its, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", KL_ESTIMATES)
def test_a_policy_is_its_own_reference_at_no_cost(name: str) -> None:
    logprobs = torch.tensor([-1e4, -3.0, -1e-3, 0.0])
    assert kl_estimates(logprobs, logprobs, name).abs().tolist() == [0.0] * 4


@given(st.floats(-1e-3, 1e-3))
def test_k3_keeps_its_digits_near_the_reference(d: float) -> None:
    """d^2 / 2 + d^3 / 6 in float32, where exp(d) - 1 - d as written would lose all of them."""
    found = float(kl_estimates(torch.tensor([0.0]), torch.tensor([d]), "k3"))
    assert found == pytest.approx(d**2 / 2 + d**3 / 6, rel=1e-3, abs=1e-10)


@given(steps, st.floats(0.5, 3))
def test_the_engines_mismatch_weighs_the_policys_term_alone(answers: list[Answer], cap: float) -> None:
    """By min(p_old / p_sampled, cap), without a gradient of its own."""
    rollouts = rollouts_of(answers)
    assert rollouts.sampled is not None
    assert rollouts.old is not None
    weights = (rollouts.old - rollouts.sampled).exp().clamp(max=cap)
    plain, further = Surrogate("token", "tokens", **CLIP), {"kl_weight": 0.1}
    corrected, uncorrected = replace(plain, importance_cap=cap, **further), replace(plain, **further)
    kl = 0.1 * kl_estimates(rollouts.logprobs, rollouts.reference, "k3")
    expected = weights * policy_gradient(rollouts, plain).per_unit + kl
    loss = policy_gradient(rollouts, corrected)
    torch.testing.assert_close(loss.per_unit, expected)
    torch.testing.assert_close(gradient(loss, rollouts), torch.autograd.grad(expected.sum(), rollouts.logprobs)[0])
    assert means(loss)["sampling/importance_sampling_ratio/mean"] == pytest.approx(float(weights.mean()))
    assert "sampling/importance_sampling_ratio/mean" not in policy_gradient(rollouts, uncorrected).kept


def test_a_token_whose_probability_the_engine_did_not_tell_is_not_weighed() -> None:
    """Nor does it count among the differences: (|-0.5| + |1|) / 2."""
    tokens = [Token(-1.0, -1.0, -1.0, sampled, 1.0, 0, 0, 0, 0) for sampled in (-0.5, nan, -2.0)]
    loss = policy_gradient(rollouts_of([tokens]), Surrogate("token", "tokens", importance_cap=2.0))
    assert (-loss.per_unit).tolist() == pytest.approx([exp(-0.5), 1.0, 2.0])
    assert means(loss)["sampling/sampling_logp_difference/mean"] == pytest.approx(0.75)


@pytest.mark.parametrize(("ratio", "slope"), [(1.1, 1.1), (1.5, 1.5), (2.9, 2.9), (3.1, 0.0), (50.0, 0.0)])
def test_a_bad_answers_loss_ends_at_the_dual_clip(ratio: float, slope: float) -> None:
    """Ye et al. 2020, eq. 5, with c = 3: of an advantage of -1 the loss is min(ratio, 3)."""
    now = float(torch.tensor(ratio, dtype=torch.float64).log())
    rollouts = rollouts_of([[Token(now, 0.0, 0.0, 0.0, -1.0, 0, 0, 0, 0)]])
    loss = policy_gradient(rollouts, Surrogate("token", "tokens", **CLIP, dual_clip=3.0))
    assert loss.per_unit.tolist() == pytest.approx([min(ratio, 3.0)])
    assert gradient(loss, rollouts).tolist() == pytest.approx([slope])


def test_what_is_clipped_is_counted_by_side() -> None:
    """Ratios of 1/2 and 2: one is too low where the advantage is negative, the other too high where it is positive."""
    good = [Token(now, 0.0, 0.0, 0.0, 1.0, 0, 0, 0, 0) for now in (-0.7, 0.7, 0.7)]
    bad = [replace(t, advantage=-1.0) for t in good]
    found = means(policy_gradient(rollouts_of([good, bad]), METHODS["dapo"]))
    shares = {"low": 1 / 6, "high": 2 / 6, "region": 3 / 6}
    assert {side: found[f"clip_ratio/{side}_mean"] for side in shares} == pytest.approx(shares)


def test_ratios_of_answers_are_counted_by_answers() -> None:
    """Of three with tokens, one has a mean log-ratio beyond the bound; the one without tokens does not count."""
    lengths = [(1, 0.01), (3, -0.01), (2, 0.0), (0, 0.0)]
    answers = [[Token(now, 0.0, 0.0, 0.0, 1.0, 0, 0, 0, 0)] * count for count, now in lengths]
    found = policy_gradient(rollouts_of(answers), METHODS["gspo"]).kept
    assert found["clip_ratio/high_mean"].tolist() == [1.0, 3.0]
    assert found["clip_ratio/low_mean"].tolist() == [0.0, 3.0]


@given(steps)
def test_metrics_are_means_over_tokens_by_the_usual_names(answers: list[Answer]) -> None:
    found = means(policy_gradient(rollouts_of(answers), WHOLE["grpo"]))
    assert found["kl"] == pytest.approx(over_tokens(answers, lambda t: t.k3), abs=1e-12)
    assert found["entropy"] == pytest.approx(over_tokens(answers, lambda t: t.entropy))
    assert found["loss/value_avg"] == pytest.approx(over_tokens(answers, of_values), abs=1e-12)
    assert found["val/clipfrac_avg"] == pytest.approx(over_tokens(answers, value_is_clipped))
    difference = over_tokens(answers, lambda t: abs(t.old - t.sampled))
    assert found["sampling/sampling_logp_difference/mean"] == pytest.approx(difference, abs=1e-12)


def test_values_without_a_clip_cost_half_their_squared_error() -> None:
    values, old, returns = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 2.0]), torch.tensor([4.0, 2.5])
    assert value_loss(values, old, returns, clip=None).tolist() == [4.5, 0.125]
    assert value_loss(values, old, returns, clip=0.5).tolist() == [6.125, 0.125]


def test_an_entropy_without_a_gradient_cannot_have_a_weight() -> None:
    """It would change the loss and teach nothing."""
    rollouts = rollouts_of([[Token(-1.0, -1.0, -1.0, -1.0, 1.0, 0.5, 0, 0, 0)]])
    assert rollouts.entropy is not None
    with pytest.raises(AssertionError, match="without effect"):
        policy_gradient(replace(rollouts, entropy=rollouts.entropy.detach()), WHOLE["grpo"])


@pytest.mark.parametrize("missing", ["reference", "entropy", "sampled", "values"])
def test_what_has_a_weight_has_to_be_given(missing: str) -> None:
    rollouts = rollouts_of([[Token(-1.0, -1.0, -1.0, -1.0, 1.0, 0.5, 0, 0, 0)]])
    with pytest.raises(AssertionError):
        policy_gradient(replace(rollouts, **{missing: None}), WHOLE["grpo"])
