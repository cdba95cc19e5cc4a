"""Losses of preference alignment: of pairs of answers, and of single answers with a verdict.

They differ in one formula each; what the formulas are made of stands once. log p of an answer is the sum over its
tokens, in nats. A reward is what a method implicitly gives an answer, up to a constant of the prompt.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from luthier.objectives.loss import Loss, Metric

__all__ = [
    "PAIR_LOSSES",
    "Answers",
    "LogRatios",
    "PairLoss",
    "Verdicts",
    "cpo",
    "dpo",
    "ipo",
    "kto",
    "orpo",
    "simpo",
]


@dataclass(frozen=True, slots=True)
class Answers:
    """logps: [answers], log p of each. tokens: [answers], how many each has. pairs: [pairs, 2], the better answer and
    the worse. reference: [answers], log p by the reference model.
    """

    logps: Tensor
    tokens: Tensor
    pairs: Tensor
    reference: Tensor | None = None

    def of_pairs(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Of [answers] the better ones' and the worse ones', [pairs] each."""
        chosen, rejected = self.pairs.T
        return values[chosen], values[rejected]

    @property
    def log_ratios(self) -> Tensor:
        """log p / p_reference, [answers]."""
        assert self.reference is not None, "this loss compares with a reference model"
        return self.logps - self.reference


@dataclass(frozen=True, slots=True)
class LogRatios:
    """What a pair's loss sees. chosen, rejected: [pairs], log p / p_reference. means: the same a token."""

    chosen: Tensor
    rejected: Tensor
    mean_chosen: Tensor
    mean_rejected: Tensor
    beta: float
    smoothing: float

    @property
    def scaled(self) -> Tensor:
        """beta times the difference of the log-ratios."""
        return self.beta * (self.chosen - self.rejected)


PairLoss = Callable[[LogRatios], Tensor]


def sigmoid(m: LogRatios) -> Tensor:
    """-(1 - e) log s(z) - e log s(-z), z = beta (chosen - rejected)

    Rafailov et al. 2023, eq. 7; with e > 0 Mitchell 2023, conservative DPO.
    """
    return _smoothed(m.scaled, m.smoothing)


def sigmoid_norm(m: LogRatios) -> Tensor:
    """As sigmoid, with log-ratios a token        Meng et al. 2024, table 3; Lambert et al. 2024, eq. 6"""
    return _smoothed(m.beta * (m.mean_chosen - m.mean_rejected), m.smoothing)


def hinge(m: LogRatios) -> Tensor:
    """max(0, 1 - z)        Zhao et al. 2023, SLiC-HF; Liu et al. 2023, RSO, eq. 9"""
    return torch.relu(1 - m.scaled)


def squared(m: LogRatios) -> Tensor:
    """(mean chosen - mean rejected - 1 / (2 beta))^2, log-ratios a token        Azar et al. 2023, eq. 17"""
    return (m.mean_chosen - m.mean_rejected - 1 / (2 * m.beta)).square()


def robust(m: LogRatios) -> Tensor:
    """(-(1 - e) log s(z) + e log s(-z)) / (1 - 2e): unbiased where e of the labels are flipped

    Ray Chowdhury et al. 2024, eq. 12.
    """
    z, e = m.scaled, m.smoothing
    return (-(1 - e) * logsigmoid(z) + e * logsigmoid(-z)) / (1 - 2 * e)


def exo_pair(m: LogRatios) -> Tensor:
    """KL of (s(z), s(-z)) from (1 - e, e)        Ji et al. 2024, eq. 16"""
    z, e = m.scaled, m.smoothing
    won = torch.sigmoid(z) * (logsigmoid(z) - math.log1p(-e))
    return won + torch.sigmoid(-z) * (logsigmoid(-z) - math.log(e))


def nca_pair(m: LogRatios) -> Tensor:
    """-log s(r_chosen) - 1/2 log s(-r_chosen) - 1/2 log s(-r_rejected)        Chen et al. 2024, eq. 11"""
    chosen, rejected = m.beta * m.chosen, m.beta * m.rejected
    return -logsigmoid(chosen) - 0.5 * (logsigmoid(-chosen) + logsigmoid(-rejected))


def bco_pair(m: LogRatios) -> Tensor:
    """-log s(r_chosen) - log s(-r_rejected)        Jung et al. 2024, eq. 10, without the moving shift"""
    return -logsigmoid(m.beta * m.chosen) - logsigmoid(-m.beta * m.rejected)


def sppo_hard(m: LogRatios) -> Tensor:
    """(chosen - 1 / (2 beta))^2 + (rejected + 1 / (2 beta))^2        Wu et al. 2024, eq. 4.7 with certain wins"""
    target = 1 / (2 * m.beta)
    return (m.chosen - target).square() + (m.rejected + target).square()


def apo_zero(m: LogRatios) -> Tensor:
    """1 - s(r_chosen) + s(r_rejected), for answers better than the model's        D'Oosterlinck et al. 2024, eq. 7"""
    return 1 - torch.sigmoid(m.beta * m.chosen) + torch.sigmoid(m.beta * m.rejected)


def apo_down(m: LogRatios) -> Tensor:
    """s(r_chosen) + 1 - s(z), for answers worse than the model's        D'Oosterlinck et al. 2024, eq. 8"""
    return torch.sigmoid(m.beta * m.chosen) + 1 - torch.sigmoid(m.scaled)


def discopop(m: LogRatios) -> Tensor:
    """(1 - s(z / 0.05)) (-log s(z)) + s(z / 0.05) exp(-z)        Lu et al. 2024, eq. 5"""
    z = m.scaled
    exponential = torch.exp(logsigmoid(z / 0.05) - z)  # the factor joined in, so that no infinity is multiplied by 0
    return torch.sigmoid(-z / 0.05) * -logsigmoid(z) + exponential


PAIR_LOSSES: dict[str, PairLoss] = {
    "apo_down": apo_down,
    "apo_zero": apo_zero,
    "bco_pair": bco_pair,
    "discopop": discopop,
    "exo_pair": exo_pair,
    "hinge": hinge,
    "ipo": squared,
    "nca_pair": nca_pair,
    "robust": robust,
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "sppo_hard": sppo_hard,
}


def dpo(
    answers: Answers, loss_type: str, *, beta: float, label_smoothing: float = 0.0, sft_weight: float = 0.0
) -> Loss:
    """DPO and its kin: a function of the log-ratios to a reference model. loss_type: a key of PAIR_LOSSES."""
    chosen, rejected = answers.of_pairs(answers.log_ratios)
    mean_chosen, mean_rejected = answers.of_pairs(answers.log_ratios / answers.tokens)
    losses = PAIR_LOSSES[loss_type](LogRatios(chosen, rejected, mean_chosen, mean_rejected, beta, label_smoothing))
    return _pairwise(answers, losses, rewards=beta * answers.log_ratios, sft_weight=sft_weight)


def ipo(answers: Answers, *, beta: float, sft_weight: float = 0.0) -> Loss:
    """IPO, as a method of its own        Azar et al. 2023"""
    return dpo(answers, "ipo", beta=beta, sft_weight=sft_weight)


def simpo(answers: Answers, *, beta: float, gamma: float, sft_weight: float = 0.0) -> Loss:
    """-log s(beta (mean log p chosen - mean log p rejected) - gamma)        Meng et al. 2024, SimPO, eq. 6"""
    rewards = beta * answers.logps / answers.tokens
    chosen, rejected = answers.of_pairs(rewards)
    return _pairwise(answers, -logsigmoid(chosen - rejected - gamma), rewards=rewards, sft_weight=sft_weight)


def cpo(answers: Answers, *, beta: float, label_smoothing: float = 0.0, sft_weight: float = 1.0) -> Loss:
    """-log s(beta (log p chosen - log p rejected)) + sft_weight * imitation        Xu et al. 2024, CPO, eq. 5"""
    rewards = beta * answers.logps
    chosen, rejected = answers.of_pairs(rewards)
    return _pairwise(answers, _smoothed(chosen - rejected, label_smoothing), rewards=rewards, sft_weight=sft_weight)


def orpo(answers: Answers, *, beta: float, sft_weight: float = 1.0) -> Loss:
    """sft_weight * imitation - beta log s(log odds chosen - log odds rejected)        Hong et al. 2024, ORPO, eq. 6

    odds(y) = p / (1 - p), where log p is the answer's mean a token (eq. 4).
    """
    means = answers.logps / answers.tokens
    log_odds = means - _log_one_minus_exp(means)
    chosen, rejected = answers.of_pairs(log_odds)
    ratio = logsigmoid(chosen - rejected)
    further = {"log_odds_chosen": chosen - rejected, "log_odds_ratio": ratio}
    return _pairwise(answers, -beta * ratio, rewards=beta * means, sft_weight=sft_weight, further=further)


@dataclass(frozen=True, slots=True)
class Verdicts:
    """logps, reference: [answers], log p of each by the policy and by the reference. tokens: [answers], how many each
    has. desirable: [answers] bool. baseline: scalar, the KL that a log-ratio is measured against; None for 0.
    """

    logps: Tensor
    tokens: Tensor
    reference: Tensor
    desirable: Tensor
    baseline: Tensor | None = None


def kto(
    verdicts: Verdicts,
    loss_type: str,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    sft_weight: float = 0.0,
) -> Loss:
    """w (1 - s(+-beta (log-ratio - baseline))), + where the answer is desirable        Ethayarajh et al. 2024, eq. 7

    loss_type: kto, or apo_zero_unpaired, which has no baseline (D'Oosterlinck et al. 2024). sft_weight: of imitating
    the desirable answers, a token. The unit is the answer.
    """
    ratios, good = verdicts.logps - verdicts.reference, verdicts.desirable
    baseline = ratios.new_zeros(()) if verdicts.baseline is None or loss_type != "kto" else verdicts.baseline
    gained = torch.where(good, ratios - baseline, baseline - ratios)
    weights = torch.where(good, ratios.new_tensor(desirable_weight), ratios.new_tensor(undesirable_weight))
    rewards = beta * ratios
    metrics: dict[str, Metric] = {
        **{"rewards/chosen": (rewards, good), "rewards/rejected": (rewards, ~good)},
        **{"logps/chosen": (verdicts.logps, good), "logps/rejected": (verdicts.logps, ~good), "kl": baseline},
    }
    losses = weights * (1 - torch.sigmoid(beta * gained))
    if sft_weight:
        imitation = -verdicts.logps / verdicts.tokens
        losses = losses + sft_weight * imitation * good
        metrics["nll_loss"] = (imitation, good)
    return Loss(losses, unit="sequences", metrics=metrics)


def _pairwise(
    answers: Answers, losses: Tensor, *, rewards: Tensor, sft_weight: float, further: dict[str, Tensor] | None = None
) -> Loss:
    """The losses, with imitation of the better answers, a token, where it is wanted; and what is told of pairs."""
    chosen, rejected = answers.of_pairs(rewards)
    chosen_logps, rejected_logps = answers.of_pairs(answers.logps)
    metrics: dict[str, Metric] = {
        **{"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected},
        **{"rewards/accuracies": (chosen > rejected).to(chosen.dtype)},
        **{"logps/chosen": chosen_logps, "logps/rejected": rejected_logps, **(further or {})},
    }
    if sft_weight:
        imitation = -answers.of_pairs(answers.logps / answers.tokens)[0]
        losses = losses + sft_weight * imitation
        metrics["nll_loss"] = imitation
    return Loss(losses, unit="pairs", metrics=metrics)


def _smoothed(margin: Tensor, smoothing: float) -> Tensor:
    return (1 - smoothing) * softplus(-margin) + smoothing * softplus(margin)


def _log_one_minus_exp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, by the form that keeps its digits (Maechler 2012); each sees its own half alone, since
    a gradient of the half not taken may be no number.
    """
    half = -math.log(2)
    near_zero = torch.log(-torch.expm1(x.clamp(min=half, max=-torch.finfo(x.dtype).tiny)))
    return torch.where(x > half, near_zero, torch.log1p(-torch.exp(x.clamp(max=half))))
