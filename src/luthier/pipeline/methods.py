"""From a stage's settings to what its loop computes: a batch is scored, and a pure function makes losses of the scores.

`STAGES` names these row by row. What an objective needs of all micro-batches of a step, such as KTO's baseline, is
prepared before the first of them, so that no loss depends on how a step is cut.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.data.batches import TokenBatch
from luthier.evaluate.calibration import calibration_error
from luthier.models.heads import score_rewards
from luthier.models.score import divergence, score
from luthier.objectives.language import language_modelling
from luthier.objectives.loss import Loss
from luthier.objectives.preference import (
    Answers,
    Verdicts,
    contrastive,
    direct,
    kahneman_tversky,
    odds_ratio,
    simple,
)
from luthier.objectives.reward import bradley_terry, stepwise
from luthier.pipeline.reference import answer_logprobs, with_reference
from luthier.recipe.preference import CPO, DPO, IPO, KTO, ORPO, ProcessReward, Reference, Reward, SimPO
from luthier.recipe.training import Training
from luthier.training.loop import Guard, Measure, Objective, Preparation

__all__ = [
    "Method",
    "contrastive_method",
    "direct_method",
    "feedback_method",
    "identity_method",
    "language_method",
    "next_tokens",
    "odds_ratio_method",
    "process_reward_method",
    "reward_method",
    "simple_method",
]


@dataclass(frozen=True, slots=True)
class Method:
    """objective: from the network and a batch to the losses. prepare: what it needs of all micro-batches of a step.
    measure, guard: what evaluations tell besides, and when the training has to end for it.
    """

    objective: Objective
    prepare: Preparation | None = None
    measure: Measure | None = None
    guard: Guard | None = None


def language_method(settings: Training) -> Method:
    """The next token's log-probability."""
    return Method(next_tokens)


def next_tokens(network: nn.Module, batch: TokenBatch) -> Loss:
    """Language modelling of a batch."""
    assert isinstance(network, PreTrainedModel)
    scores = score(network, batch)
    weights = batch.weights.to(scores.logprobs.device)
    return language_modelling(scores.logprobs, weights, scores.entropy)


def direct_method(settings: DPO) -> Method:
    """DPO and the losses of its kind."""

    def loss(answers: Answers) -> Loss:
        return direct(
            answers,
            settings.loss_type,
            beta=settings.beta,
            label_smoothing=settings.label_smoothing,
            sft_weight=settings.sft_weight,
        )

    return _with_divergence(Method(_of_answers(loss), _live_reference(settings)), settings)


def identity_method(settings: IPO) -> Method:
    """IPO: DPO with a squared distance to a margin."""

    def loss(answers: Answers) -> Loss:
        return direct(answers, "ipo", beta=settings.beta, sft_weight=settings.sft_weight)

    return _with_divergence(Method(_of_answers(loss), _live_reference(settings)), settings)


def simple_method(settings: SimPO) -> Method:
    """SimPO."""

    def loss(answers: Answers) -> Loss:
        return simple(answers, beta=settings.beta, gamma=settings.gamma, sft_weight=settings.sft_weight)

    return Method(_of_answers(loss))


def contrastive_method(settings: CPO) -> Method:
    """CPO."""

    def loss(answers: Answers) -> Loss:
        smoothing = settings.label_smoothing
        return contrastive(answers, beta=settings.beta, label_smoothing=smoothing, sft_weight=settings.sft_weight)

    return Method(_of_answers(loss))


def odds_ratio_method(settings: ORPO) -> Method:
    """ORPO."""

    def loss(answers: Answers) -> Loss:
        return odds_ratio(answers, beta=settings.beta, sft_weight=settings.sft_weight)

    return Method(_of_answers(loss))


def feedback_method(settings: KTO) -> Method:
    """KTO. Its baseline is the mean log-ratio of a step's mismatched answers, at least 0 (section 4.1 of the paper)."""

    def objective(network: nn.Module, batch: TokenBatch) -> Loss:
        batch = batch.to(_device(network))
        assert batch.reference is not None, "feedback is compared with a reference model"
        assert batch.desirable is not None, "feedback has a verdict"
        tokens = torch.tensor(batch.target_counts, device=batch.target_ids.device)
        verdicts = Verdicts(answer_logprobs(network, batch), tokens, batch.reference, batch.desirable, batch.baseline)
        return kahneman_tversky(
            verdicts,
            settings.loss_type,
            beta=settings.beta,
            desirable_weight=settings.desirable_weight,
            undesirable_weight=settings.undesirable_weight,
            sft_weight=settings.sft_weight,
        )

    live = _live_reference(settings)

    def prepare(network: nn.Module, batches: Sequence[TokenBatch]) -> list[TokenBatch]:
        referred = list(batches) if live is None else live(network, batches)
        return referred if settings.loss_type != "kto" else _with_baseline(network, referred)

    return _with_divergence(Method(objective, prepare), settings)


def reward_method(settings: Reward) -> Method:
    """A reward model."""

    def objective(network: nn.Module, batch: TokenBatch) -> Loss:
        assert isinstance(network, PreTrainedModel)
        batch = batch.to(network.device)
        margins = batch.margins if settings.margins else None
        return bradley_terry(
            score_rewards(network, batch), batch.pairs, margins=margins, center=settings.center_rewards
        )

    return Method(objective, measure=_calibration)


def process_reward_method(settings: ProcessReward) -> Method:
    """A process reward model, which reads a reward off each step's last token."""

    def objective(network: nn.Module, batch: TokenBatch) -> Loss:
        assert isinstance(network, PreTrainedModel)
        batch = batch.to(network.device)
        assert batch.correct is not None, "each step has a label"
        return stepwise(score_rewards(network, batch, batch.target_index + 1), batch.correct)

    return Method(objective)


def _calibration(network: nn.Module, batches: Sequence[TokenBatch]) -> dict[str, float]:
    """How far the rewards' confidence is from how often they are right."""
    assert isinstance(network, PreTrainedModel)
    margins: list[float] = []
    for batch in batches:
        rewards = score_rewards(network, batch).cpu()
        margins += (rewards[batch.pairs[:, 0].cpu()] - rewards[batch.pairs[:, 1].cpu()]).tolist()
    return {"rewards/calibration_error": calibration_error(margins)}


def _with_divergence(method: Method, settings: Reference) -> Method:
    """The same, told and guarded by KL(policy || reference) a token, which only an adapter to switch off can tell."""
    if settings.adapter is None or settings.reference is not None:
        return method

    bound = settings.max_kl

    def guard(measured: dict[str, float]) -> str | None:
        found = measured["kl_per_token"]
        if bound is None or found <= bound:
            return None
        return f"the policy is {found:.3f} nats a token from its reference, over max_kl {bound}"

    return replace(method, measure=_divergence, guard=None if bound is None else guard)


@torch.no_grad()
def _divergence(network: nn.Module, batches: Sequence[TokenBatch]) -> dict[str, float]:
    assert isinstance(network, PreTrainedModel)
    found = torch.cat([divergence(network, batch) for batch in batches])
    return {"kl_per_token": float(found.mean())}


def _of_answers(loss: Callable[[Answers], Loss]) -> Objective:
    def objective(network: nn.Module, batch: TokenBatch) -> Loss:
        batch = batch.to(_device(network))
        tokens = torch.tensor(batch.target_counts, device=batch.target_ids.device)
        return loss(Answers(answer_logprobs(network, batch), tokens, batch.pairs, batch.reference))

    return objective


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _live_reference(settings: Reference) -> Preparation | None:
    return None if settings.cache_reference else with_reference


@torch.no_grad()
def _with_baseline(network: nn.Module, batches: Sequence[TokenBatch]) -> list[TokenBatch]:
    """Every batch with the baseline of all of them."""
    ratios: list[Tensor] = []
    for batch in batches:
        assert batch.mismatched is not None, "KTO's answers come with mismatched ones"
        assert batch.mismatched.reference is not None, "a baseline compares with a reference model"
        other = batch.mismatched.to(_device(network))
        assert other.reference is not None
        ratios.append(answer_logprobs(network, other) - other.reference)
    baseline = torch.cat(ratios).mean().clamp(min=0)
    return [replace(batch, baseline=baseline) for batch in batches]
