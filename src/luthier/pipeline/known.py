"""What models say of a rollout's answers before anything is learned from them: the policy, its reference, a value head.

The reference is the policy with its adapter switched off, so the models of reinforcement learning from feedback are one
set of weights.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.adapters.switch import adapters_off
from luthier.data.batches import TokenBatch, collate, passes
from luthier.data.sequences import TokenGroup
from luthier.models.score import evaluating, hidden_states, score
from luthier.models.values import values_at
from luthier.pipeline.policy import critic_on
from luthier.recipe.policy import PPO, OnPolicy

__all__ = ["known_of"]

Pass = Callable[[PreTrainedModel, TokenBatch], Tensor]


@dataclass(frozen=True, slots=True)
class _Passes:
    """Passes over a batch that each give a number of every target."""

    temperature: float
    own_trunk: bool

    def logprobs(self, network: PreTrainedModel, batch: TokenBatch) -> Tensor:
        return score(network, batch, temperature=self.temperature).logprobs

    def by_reference(self, network: PreTrainedModel, batch: TokenBatch) -> Tensor:
        with adapters_off(network):
            return self.logprobs(network, batch)

    def values(self, network: PreTrainedModel, batch: TokenBatch) -> Tensor:
        with critic_on(network) if self.own_trunk else nullcontext():
            return values_at(network, hidden_states(network, batch)[batch.target_index])


def known_of(
    network: PreTrainedModel, groups: Sequence[TokenGroup], settings: OnPolicy, *, micro_batch_tokens: int | None
) -> dict[str, Tensor]:
    """By name, of all targets of the groups in their order, [targets] float32: "old" where the policy will have changed
    before all is learned, or a divergence counts in the reward; "reference" where there is a divergence; "values" of a
    value head.
    """
    by = _Passes(settings.temperature, isinstance(settings, PPO) and settings.value_trunk == "own")
    wanted: dict[str, Pass] = {}
    if settings.minibatches * settings.rollout_epochs > 1 or (settings.beta and settings.kl_in == "reward"):
        wanted["old"] = by.logprobs
    if settings.beta:
        wanted["reference"] = by.by_reference
    if isinstance(settings, PPO):
        wanted["values"] = by.values
    if not wanted:
        return {}
    with evaluating(network):
        return _passed(network, groups, wanted, micro_batch_tokens)


def _passed(
    network: PreTrainedModel,
    groups: Sequence[TokenGroup],
    wanted: dict[str, Pass],
    micro_batch_tokens: int | None,
) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {name: [torch.empty(0)] * len(groups) for name in wanted}
    for members in passes(groups, micro_batch_tokens):
        batch = collate([groups[i] for i in members]).to(network.device)
        counts = [groups[i].num_trained for i in members]
        for name, one in wanted.items():
            for i, piece in zip(members, one(network, batch).float().cpu().split(counts), strict=True):
                found[name][i] = piece
    return {name: torch.cat(pieces) for name, pieces in found.items()}
