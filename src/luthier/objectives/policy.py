"""The policy objective: PPO, GRPO and their kin are settings of one formula.

A sampled token costs -w min(r A, clip(r) A) + beta KL - c H + v (value loss), and methods differ in what the ratio r is
of, where it is clipped, and over what the losses are averaged. Advantages A are made beforehand of a whole rollout, see
advantages.py: nothing here looks at what else lies in a micro-batch. old, sampled, reference, advantages and returns
are taken as numbers, and no gradient is wanted of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Literal

import torch
from torch import Tensor

from luthier.objectives.loss import Loss, Metric

__all__ = ["KL_ESTIMATES", "Rollouts", "Surrogate", "Values", "kl_estimates", "policy_gradient", "value_loss"]

_STEEPEST = 20.0  # e^20 is 5e8: no run that still learns has ratios beyond it, and float32 overflows at e^88


@dataclass(frozen=True, slots=True)
class Values:
    """What a value head expects still to come at each target: now (differentiable) and when it was sampled; and the
    returns that it should have expected. [targets] each, in units of the reward.
    """

    now: Tensor
    old: Tensor
    returns: Tensor


@dataclass(frozen=True, slots=True)
class Rollouts:
    """The answers of a micro-batch, their tokens end to end: all [targets], log-probabilities and entropy in nats.

    logprobs: by the policy now, differentiable. sequence: int64, rising, which answer a target is of; an answer may
    have none. old: before the first update with this rollout; None for the first one itself. sampled: as the sampling
    engine computed them, NaN where it could not say. reference: by the reference model. entropy: of the policy now,
    differentiable where it has a weight.
    """

    logprobs: Tensor
    advantages: Tensor
    sequence: Tensor
    num_sequences: int
    old: Tensor | None = None
    sampled: Tensor | None = None
    reference: Tensor | None = None
    entropy: Tensor | None = None
    values: Values | None = None

    @property
    def before(self) -> Tensor:
        """log p before the first update, [targets], without gradient."""
        return self.logprobs.detach() if self.old is None else self.old

    @property
    def counts(self) -> Tensor:
        """How many targets each answer has, [sequences] int64."""
        return self._offsets().diff()

    def sums(self, values: Tensor) -> Tensor:
        """Of [targets] the sum over each answer, 0 for one without targets: [sequences]."""
        return torch.segment_reduce(values, "sum", offsets=self._offsets())

    def means(self, values: Tensor) -> Tensor:
        """Of [targets] the mean over each answer, 0 for one without targets: [sequences]."""
        return self.sums(values) / self.counts.clamp(min=1)

    def _offsets(self) -> Tensor:
        """Where each answer begins, and the end: [sequences + 1]."""
        borders = torch.arange(self.num_sequences + 1, device=self.sequence.device)
        return torch.searchsorted(self.sequence, borders)


@dataclass(frozen=True, slots=True)
class Surrogate:
    """The settings that make a method.

    ratio: p / p_old of a token; of a "sequence" its geometric mean a token (Zheng et al. 2025, GSPO, eq. 7); or "none",
    the plain policy gradient of A log p (Williams 1992). clip_low, clip_high: the ratio is not rewarded for leaving
    [1 - clip_low, 1 + clip_high] (Schulman et al. 2017, PPO, eq. 7; apart from each other in DAPO, Yu et al. 2025, eq.
    10); None for no bound. dual_clip: the ratio at which a bad answer's loss ends, above 1 + clip_high (Ye et al. 2020,
    eq. 5).
    aggregate: the unit is the token; or the answer, with the mean over its tokens ("sequences"), their sum, or the sum
    over `length`, the longest allowed answer in tokens ("constant"; Liu et al. 2025, Dr. GRPO).
    kl_weight, kl_estimator: of the divergence from the reference in the loss, see `kl_estimates`. kl_corrected: it is
    multiplied by the ratio, gradient included, so that k1 and k3 too have the KL's gradient in the mean where the ratio
    is a token's (DeepSeek-AI 2025, DeepSeek-V3.2). entropy_weight: of the entropy, which is to grow. importance_cap:
    weighs the policy's term by min(p_old / p_sampled, cap), because the engine that sampled is not exactly the model
    (Yao et al. 2025, truncated importance sampling); None for no weights.
    value_weight, value_clip: of `value_loss`.
    """

    ratio: Literal["token", "sequence", "none"]
    aggregate: Literal["tokens", "sequences", "constant", "sum"]
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    length: int | None = None
    kl_weight: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_corrected: bool = False
    entropy_weight: float = 0.0
    importance_cap: float | None = None
    value_weight: float = 0.0
    value_clip: float | None = None

    def __post_init__(self) -> None:
        bounds = (self.clip_low, self.clip_high, self.dual_clip)
        assert self.ratio != "none" or bounds == (None, None, None), "without a ratio there is nothing to clip"
        assert self.ratio != "none" or not self.kl_corrected, "without a ratio there is nothing to correct by"
        assert self.aggregate != "constant" or self.length, "a constant length has to be given"
        assert self.dual_clip is None or self.dual_clip > self.bounds[1], "a dual clip lies above the clipped region"

    @property
    def bounds(self) -> tuple[float, float]:
        """The region outside of which a ratio is not rewarded."""
        low = -inf if self.clip_low is None else 1 - self.clip_low
        return low, inf if self.clip_high is None else 1 + self.clip_high


Term = tuple[Tensor, dict[str, Metric]]


def policy_gradient(rollouts: Rollouts, surrogate: Surrogate) -> Loss:
    """-w min(r A, clip(r) A) + kl_weight KL - entropy_weight H + value_weight (value loss)

    Schulman et al. 2017, PPO, eq. 9; Shao et al. 2024, GRPO, eq. 3. Losses are per token and then aggregated, all terms
    alike. The unit is the token or the answer, by `Surrogate.aggregate`.
    """
    ratios = None if surrogate.ratio == "none" else _ratios(rollouts, surrogate)
    losses, metrics = _reinforced(rollouts) if ratios is None else _clipped(rollouts, surrogate, ratios)
    assert surrogate.importance_cap is None or rollouts.sampled is not None, "weights need what the engine sampled with"
    if rollouts.sampled is not None:
        weights, told = _importance(rollouts, rollouts.sampled, surrogate.importance_cap)
        losses, metrics = losses * weights, metrics | told
    for weight, term in (
        (surrogate.kl_weight, _divergence(rollouts, surrogate, ratios)),
        (-surrogate.entropy_weight, _entropy(rollouts)),
        (surrogate.value_weight, _value(rollouts, surrogate)),
    ):
        assert term or not weight, "what has a weight has to be given"
        if term:
            assert not weight or term[0].requires_grad == losses.requires_grad, "a weight without effect"
            losses, metrics = losses + weight * term[0], metrics | term[1]
    return _aggregated(losses, metrics, rollouts, surrogate)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None) -> Tensor:
    """max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2) / 2, [targets]

    PPO's, as its authors' code has it and Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO", tell. No
    clip leaves half of the squared error in Schulman et al. 2017, eq. 9.
    """
    errors = (values - returns).square()
    if clip is not None:
        errors = torch.maximum(errors, (_near(values, old_values, clip) - returns).square())
    return 0.5 * errors


def kl_estimates(logprobs: Tensor, reference: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Estimates of KL(p || p_reference) from tokens that p sampled, one a token, [targets], in nats.

    Schulman 2020, "Approximating KL divergence", by names k1, k2, k3: with d = log p_reference - log p these are -d,
    d^2 / 2 and e^d - 1 - d. k1 and k3 have the KL as their mean; k3 varies less and is never negative. As a loss k2 has
    the KL's gradient in the mean and k1 has none, so k1 belongs into rewards.
    """
    return KL_ESTIMATES[estimator](reference - logprobs)


def _k1(differences: Tensor) -> Tensor:
    return -differences


def _k2(differences: Tensor) -> Tensor:
    return 0.5 * differences.square()


def _k3(differences: Tensor) -> Tensor:
    near = differences.clamp(max=_STEEPEST)
    return near.expm1() + near.exp() * (differences - near) - differences  # expm1 keeps the digits of small ones


KL_ESTIMATES: dict[str, Callable[[Tensor], Tensor]] = {"k1": _k1, "k2": _k2, "k3": _k3}


def _reinforced(rollouts: Rollouts) -> Term:
    return -rollouts.advantages * rollouts.logprobs, {}


def _clipped(rollouts: Rollouts, surrogate: Surrogate, ratios: Tensor) -> Term:
    """-min(r A, clip(r) A), [targets]; and how many ratios are clipped, of tokens or of answers."""
    advantages, (low, high) = rollouts.advantages, surrogate.bounds
    gained = ratios if surrogate.dual_clip is None else ratios.clamp(max=surrogate.dual_clip)
    losses = -torch.min(gained * advantages, ratios.clamp(low, high) * advantages)
    too_low, too_high = (ratios < low) & (advantages < 0), (ratios > high) & (advantages > 0)
    shares = {"low": too_low, "high": too_high, "region": too_low | too_high}
    return losses, {f"clip_ratio/{side}_mean": _share(rollouts, surrogate, cut) for side, cut in shares.items()}


def _ratios(rollouts: Rollouts, surrogate: Surrogate) -> Tensor:
    log_ratios = rollouts.logprobs - rollouts.before
    if surrogate.ratio == "sequence":
        log_ratios = rollouts.means(log_ratios)[rollouts.sequence]
    return _exp(log_ratios)


def _share(rollouts: Rollouts, surrogate: Surrogate, cut: Tensor) -> Metric:
    if surrogate.ratio != "sequence":
        return cut
    return rollouts.means(cut.to(rollouts.logprobs.dtype)), rollouts.counts > 0


def _importance(rollouts: Rollouts, sampled: Tensor, cap: float | None) -> Term:
    """min(p_old / p_sampled, cap), [targets], and 1 where the engine could not say p_sampled or no weights are wanted;
    and how far the engine is from the model.
    """
    known = ~sampled.isnan()
    differences = torch.where(known, rollouts.before - sampled, 0)
    told: dict[str, Metric] = {"sampling/sampling_logp_difference/mean": (differences.abs(), known)}
    if cap is None:
        return torch.ones_like(differences), told
    weights = _exp(differences).clamp(max=cap)
    return weights, {**told, "sampling/importance_sampling_ratio/mean": weights}


def _divergence(rollouts: Rollouts, surrogate: Surrogate, ratios: Tensor | None) -> Term | None:
    if rollouts.reference is None:
        return None
    kl = kl_estimates(rollouts.logprobs, rollouts.reference, surrogate.kl_estimator)
    if surrogate.kl_corrected and ratios is not None:
        kl = kl * ratios
    return kl, {"kl": kl}


def _entropy(rollouts: Rollouts) -> Term | None:
    return None if rollouts.entropy is None else (rollouts.entropy, {"entropy": rollouts.entropy})


def _value(rollouts: Rollouts, surrogate: Surrogate) -> Term | None:
    if rollouts.values is None:
        return None
    now, old, returns = rollouts.values.now, rollouts.values.old, rollouts.values.returns
    losses = value_loss(now, old, returns, clip=surrogate.value_clip)
    moved = (now - old).abs() > (inf if surrogate.value_clip is None else surrogate.value_clip)
    clipped = moved & (losses > value_loss(now, old, returns, clip=None))  # one that has not moved may round upwards
    return losses, {"loss/value_avg": losses, "val/clipfrac_avg": clipped}


def _aggregated(losses: Tensor, metrics: dict[str, Metric], rollouts: Rollouts, surrogate: Surrogate) -> Loss:
    if surrogate.aggregate == "tokens":
        return Loss(losses, unit="tokens", metrics=metrics)
    if surrogate.aggregate == "sequences":
        return Loss(rollouts.means(losses), unit="sequences", metrics=metrics)
    divisor = surrogate.length if surrogate.aggregate == "constant" and surrogate.length else 1
    return Loss(rollouts.sums(losses) / divisor, unit="sequences", metrics=metrics)


def _near(values: Tensor, old_values: Tensor, clip: float) -> Tensor:
    return old_values + (values - old_values).clamp(-clip, clip)


def _exp(x: Tensor) -> Tensor:
    """exp(x), and beyond x = 20 its tangent there, so that neither the value nor the gradient is ever infinite."""
    near = x.clamp(max=_STEEPEST)
    return near.exp() * (1 + x - near)
