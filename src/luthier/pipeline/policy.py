"""What a policy stage computes: advantages of a rollout's tokens, and the objective of a batch of them.

The formulas stand in `objectives/`; here they are given what the stage's settings say. A value head reads the policy's
own hidden states, or those of a second adapter, the critic, over the same frozen weights.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.adapters.switch import adapters_on
from luthier.data.batches import TokenBatch
from luthier.models.score import hidden_states, scores_of
from luthier.models.values import values_at
from luthier.objectives.advantages import gae, group_advantages, returns_to_go, token_rewards, whitened
from luthier.objectives.loss import Loss
from luthier.objectives.policy import Rollouts, Surrogate, Values, policy_gradient
from luthier.recipe.policy import PPO, OnPolicy

__all__ = ["COLUMNS", "CRITIC", "Scored", "advantages", "critic_on", "guard_of", "policy_objective", "surrogate_of"]

CRITIC = "critic"  # the name of the adapter under a value head with a trunk of its own
COLUMNS = ("advantages", "old", "reference", "returns", "sampled", "values")
"""What a rollout may know of each target."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A rollout's answers, and of their tokens what is known. scores, groups: [answers]. sequence: [targets] int64,
    rising, which answer a target is of. kl: [targets], log p_old - log p_reference, where a reference is asked. values:
    [targets], of a value head.
    """

    scores: Tensor
    groups: Tensor
    sequence: Tensor
    kl: Tensor | None = None
    values: Tensor | None = None


def advantages(settings: OnPolicy, scored: Scored, *, beta: float) -> dict[str, Tensor]:
    """Of every target its advantage, and with a value head the return that it should have expected, by name.

    beta: what a nat of divergence takes off the reward, where it counts there.
    """
    off = torch.zeros(len(scored.sequence)) if scored.kl is None or settings.kl_in == "loss" else scored.kl
    returns: dict[str, Tensor] = {}
    if isinstance(settings, PPO) and settings.baseline == "value":
        assert scored.values is not None, "this baseline is a value head's"
        scores = whitened(scored.scores, keep_mean=True) if settings.whiten_rewards else scored.scores
        rewards = token_rewards(scores, off, scored.sequence, kl_weight=beta)
        found, returns["returns"] = gae(rewards, scored.values, scored.sequence, gamma=settings.gamma, lam=settings.lam)
    elif settings.baseline == "none" or settings.baseline == "value":
        rewards = token_rewards(scored.scores, off, scored.sequence, kl_weight=beta)
        found = returns_to_go(rewards, scored.sequence, gamma=settings.gamma)
    else:
        baseline = settings.baseline
        taken = torch.zeros_like(scored.scores).index_add(0, scored.sequence, off)
        whole = group_advantages(
            scored.scores - beta * taken, scored.groups, baseline=baseline, scale=_scale_of_answers(settings)
        )
        found = whole[scored.sequence]
    return {"advantages": whitened(found) if settings.scale == "whitened" else found, **returns}


def _scale_of_answers(settings: OnPolicy) -> Literal["group_std", "batch_std", "none"]:
    return "none" if settings.scale == "whitened" else settings.scale


def surrogate_of(settings: OnPolicy) -> Surrogate:
    """The objective's settings."""
    return Surrogate(
        ratio=settings.ratio,
        aggregate=settings.aggregate,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
        length=settings.max_new_tokens,
        kl_weight=settings.beta if settings.kl_in == "loss" else 0.0,
        kl_estimator=settings.kl_estimator,
        entropy_weight=settings.entropy_weight,
        importance_cap=settings.importance_cap,
        value_weight=settings.value_weight if isinstance(settings, PPO) else 0.0,
        value_clip=settings.value_clip if isinstance(settings, PPO) else None,
    )


def policy_objective(settings: OnPolicy) -> Callable[[nn.Module, TokenBatch], Loss]:
    """The policy's loss of a batch whose columns are what its rollout knows of each target."""
    surrogate = surrogate_of(settings)

    def objective(network: nn.Module, batch: TokenBatch) -> Loss:
        assert isinstance(network, PreTrainedModel)
        batch = batch.to(network.device)
        hidden = hidden_states(network, batch)[batch.target_index]
        scores = scores_of(
            network, hidden, batch, temperature=settings.temperature, entropy_gradient=settings.entropy_weight > 0
        )
        rollouts = Rollouts(
            scores.logprobs,
            batch.columns["advantages"],
            batch.target_sequence,
            batch.count("sequences"),
            old=batch.columns.get("old"),
            sampled=batch.columns["sampled"] if settings.importance_cap is not None else None,
            reference=batch.columns.get("reference"),
            entropy=scores.entropy,
            values=_values(network, batch, hidden, settings) if isinstance(settings, PPO) else None,
        )
        return policy_gradient(rollouts, surrogate)

    return objective


def _values(network: PreTrainedModel, batch: TokenBatch, hidden: Tensor, settings: PPO) -> Values:
    if settings.value_trunk == "own":
        with critic_on(network):
            hidden = hidden_states(network, batch)[batch.target_index]
    return Values(values_at(network, hidden), batch.columns["values"], batch.columns["returns"])


@contextmanager
def critic_on(network: PreTrainedModel) -> Iterator[None]:
    """For the time of the context, the critic's adapter in place of the policy's."""
    with adapters_on(network, CRITIC):
        yield


def guard_of(settings: OnPolicy) -> Callable[[dict[str, float]], str | None] | None:
    """Ends the training where the policy has gone too far."""
    bound = settings.max_kl
    if bound is None:
        return None

    def guard(measured: dict[str, float]) -> str | None:
        found = measured.get("kl")
        if found is None or found <= bound:
            return None
        return f"the policy is {found:.3f} nats a token from its reference, over max_kl {bound}"

    return guard
