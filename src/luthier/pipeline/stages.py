"""STAGES: what each training stage of a recipe computes. Its settings stand in `recipe/stages.py`, row by row."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from luthier.data.batches import TokenBatch
from luthier.models.score import score
from luthier.objectives.language import language_modelling
from luthier.objectives.loss import Loss
from luthier.training.loop import Objective

__all__ = ["STAGES", "StageKind"]


@dataclass(frozen=True, slots=True)
class StageKind:
    """objective: from the network and a batch to the losses. summary: one line for `luthier --help`."""

    objective: Objective
    summary: str


def _next_tokens(network: nn.Module, batch: TokenBatch) -> Loss:
    assert isinstance(network, PreTrainedModel)
    scores = score(network, batch)
    weights = batch.weights.to(scores.logprobs.device)
    return language_modelling(scores.logprobs, weights, scores.entropy)


STAGES: dict[str, StageKind] = {
    "pretrain": StageKind(_next_tokens, "Go on pretraining on plain text, with general text mixed in."),
    "sft": StageKind(_next_tokens, "Fine-tune on conversations."),
}
