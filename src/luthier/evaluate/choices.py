"""Questions with choices, answered by how likely the model holds each choice.

The accuracy is the one that lm-evaluation-harness calls acc_norm (Gao et al. 2021): the choice with the highest
log-probability a character, so that a long one is not at a disadvantage and no tokenizer has a say in how long it is.
"""

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from luthier.data.batches import collate, passes
from luthier.data.sequences import TokenGroup
from luthier.models.score import evaluating, sequence_logprobs

__all__ = ["answered_rightly", "likeliest"]


def likeliest(logprobs: Sequence[float], num_characters: Sequence[int]) -> int | None:
    """argmax of log p(choice) / characters of the choice; None where one is not a number."""
    scores = [logprob / length for logprob, length in zip(logprobs, num_characters, strict=True)]
    return scores.index(max(scores)) if all(map(math.isfinite, scores)) else None


def answered_rightly(
    network: PreTrainedModel,
    questions: Sequence[TokenGroup],
    num_characters: Sequence[Sequence[int]],
    micro_batch_tokens: int | None,
) -> list[bool]:
    """For each question whether its likeliest choice is the right one, which has the highest score of its group.

    num_characters: of each question's choices.
    """
    found: dict[int, bool] = {}
    with evaluating(network):
        for members in passes(questions, micro_batch_tokens):
            batch = collate([questions[i] for i in members])
            sizes = [len(questions[i].sequences) for i in members]
            for i, logprobs in zip(members, torch.split(sequence_logprobs(network, batch), sizes), strict=True):
                scores = questions[i].scores or ()
                found[i] = likeliest(logprobs.tolist(), num_characters[i]) == scores.index(max(scores))
    return [found[i] for i in range(len(questions))]
