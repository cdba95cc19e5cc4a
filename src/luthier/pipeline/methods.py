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
from luthier.models.score import divergence, score, sequence_logprobs
from luthier.objectives.language import language_modelling
from luthier.objectives.loss import Loss
from luthier.objectives.preference import Answers, Verdicts, kto
from luthier.objectives.reward import bradley_terry, stepwise
from luthier.pipeline.policy import guard_of, policy_objective
from luthier.pipeline.reference import with_reference
from luthier.recipe.policy import OnPolicy
from luthier.recipe.preference import KTO, OnPairs, ProcessReward, Reward, WithReference
from luthier.recipe.training import Training
from luthier.training.run import Guard, Measure, Objective, Preparation

__all__ = [
    "Method",
    "feedback_method",
    "language_method",
    "next_tokens",
    "on_pairs",
    "policy_method",
    "process_reward_method",
    "reward_method",
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
    scores = score(_pretrained(network), batch)
    weights = batch.weights.to(scores.logprobs.device)
    return language_modelling(scores.logprobs, weights, scores.entropy)


def on_pairs(loss: Callable[..., Loss], *names: str) -> Callable[[OnPairs], Method]:
    """A method whose objective is this loss of pairs, with the settings of these names."""

    def method(settings: OnPairs) -> Method:
        given = {name: getattr(settings, name) for name in names}

        def objective(network: nn.Module, batch: TokenBatch) -> Loss:
            batch = _moved(batch, network)
            tokens = torch.tensor(batch.target_counts, device=batch.target_ids.device)
            logprobs = sequence_logprobs(_pretrained(network), batch)
            return loss(Answers(logprobs, tokens, batch.pairs, batch.reference), **given)

        return _compared(Method(objective), settings) if isinstance(settings, WithReference) else Method(objective)

    return method


def feedback_method(settings: KTO) -> Method:
    """KTO. Its baseline is the mean log-ratio of a step's mismatched answers, at least 0 (section 4.1 of the paper)."""

    def objective(network: nn.Module, batch: TokenBatch) -> Loss:
        batch = _moved(batch, network)
        assert batch.reference is not None, "feedback is compared with a reference model"
        assert batch.desirable is not None, "feedback has a verdict"
        tokens = torch.tensor(batch.target_counts, device=batch.target_ids.device)
        logprobs = sequence_logprobs(_pretrained(network), batch)
        return kto(
            Verdicts(logprobs, tokens, batch.reference, batch.desirable, batch.baseline),
            settings.loss_type,
            beta=settings.beta,
            desirable_weight=settings.desirable_weight,
            undesirable_weight=settings.undesirable_weight,
            sft_weight=settings.sft_weight,
        )

    method = _compared(Method(objective), settings)

    def prepare(network: nn.Module, batches: Sequence[TokenBatch]) -> list[TokenBatch]:
        referred = list(batches) if method.prepare is None else method.prepare(network, batches)
        return _with_baseline(network, referred) if settings.loss_type == "kto" else referred

    return replace(method, prepare=prepare)


def reward_method(settings: Reward) -> Method:
    """A reward model."""

    def objective(network: nn.Module, batch: TokenBatch) -> Loss:
        batch = _moved(batch, network)
        margins = batch.margins if settings.margins else None
        return bradley_terry(
            score_rewards(_pretrained(network), batch), batch.pairs, margins=margins, center=settings.center_rewards
        )

    return Method(objective, measure=_calibration)


def policy_method(settings: OnPolicy) -> Method:
    """PPO, GRPO and their kin."""
    return Method(policy_objective(settings), guard=guard_of(settings))


def process_reward_method(settings: ProcessReward) -> Method:
    """A process reward model, which reads a reward off each step's last token."""

    def objective(network: nn.Module, batch: TokenBatch) -> Loss:
        batch = _moved(batch, network)
        assert batch.correct is not None, "each step has a label"
        return stepwise(score_rewards(_pretrained(network), batch, batch.target_index + 1), batch.correct)

    return Method(objective)


def _calibration(network: nn.Module, batches: Sequence[TokenBatch]) -> dict[str, float]:
    """How far the rewards' confidence is from how often they are right."""
    margins: list[float] = []
    for batch in batches:
        rewards = score_rewards(_pretrained(network), batch).cpu()
        margins += (rewards[batch.pairs[:, 0].cpu()] - rewards[batch.pairs[:, 1].cpu()]).tolist()
    return {"rewards/calibration_error": calibration_error(margins)}


def _compared(method: Method, settings: WithReference) -> Method:
    """The same, with its reference where that is not cached; and held to max_kl, KL(policy || reference) a token, which
    takes an evaluation twice more through the network.
    """
    method = replace(method, prepare=None if settings.cache_reference else with_reference)
    bound = settings.max_kl
    if bound is None:
        return method

    def guard(measured: dict[str, float]) -> str | None:
        found = measured.get("kl_per_token")  # which evaluations alone tell
        if found is None or found <= bound:
            return None
        return f"the policy is {found:.3f} nats a token from its reference, over max_kl {bound}"

    return replace(method, measure=_divergence, guard=guard)


@torch.no_grad()
def _divergence(network: nn.Module, batches: Sequence[TokenBatch]) -> dict[str, float]:
    found = torch.cat([divergence(_pretrained(network), batch) for batch in batches])
    return {"kl_per_token": float(found.mean())}


def _moved(batch: TokenBatch, network: nn.Module) -> TokenBatch:
    """The batch where the network is."""
    return batch.to(next(network.parameters()).device)


def _pretrained(network: nn.Module) -> PreTrainedModel:
    assert isinstance(network, PreTrainedModel)
    return network


@torch.no_grad()
def _with_baseline(network: nn.Module, batches: Sequence[TokenBatch]) -> list[TokenBatch]:
    """Every batch with the baseline of all of them."""
    ratios: list[Tensor] = []
    for batch in batches:
        assert batch.mismatched is not None, "KTO's answers come with mismatched ones"
        assert batch.mismatched.reference is not None, "a baseline compares with a reference model"
        other = _moved(batch.mismatched, network)
        assert other.reference is not None
        whole = torch.tensor(other.target_counts, device=other.reference.device) > 0  # a long prompt may leave no room
        ratios.append((sequence_logprobs(_pretrained(network), other) - other.reference)[whole])
    joined = torch.cat(ratios)
    baseline = joined.mean().clamp(min=0) if len(joined) else joined.new_zeros(())
    return [replace(batch, baseline=baseline) for batch in batches]
