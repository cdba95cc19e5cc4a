"""Losses of reward models: of two answers the better one shall have the higher reward, of an answer's steps the right
ones a positive one.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from luthier.objectives.loss import Loss, Metric

__all__ = ["bradley_terry", "stepwise"]


def bradley_terry(rewards: Tensor, pairs: Tensor, *, margins: Tensor | None = None, center: float = 0.0) -> Loss:
    """-log s(r_chosen - r_rejected - margin) + center (r_chosen + r_rejected)^2

    Bradley and Terry 1952; the margin of Touvron et al. 2023, eq. 2; the centring of Eisenstein et al. 2023, eq. 2.
    rewards: [sequences]. pairs: [pairs, 2], the better sequence and the worse. margins: [pairs] in units of the
    reward. The unit is the pair.
    """
    chosen, rejected = rewards[pairs[:, 0]], rewards[pairs[:, 1]]
    margin = chosen - rejected
    losses = softplus(-margin if margins is None else margins - margin)
    metrics = {
        **{"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": margin},
        "rewards/accuracies": (margin > 0).to(margin.dtype),
    }
    return Loss(losses + center * (chosen + rejected).square(), unit="pairs", metrics=metrics)


def stepwise(rewards: Tensor, correct: Tensor) -> Loss:
    """-log s(r) of a step that is right, -log s(-r) of one that is not: s(r) is how likely it is right

    Lightman et al. 2023, section 2.6; Uesato et al. 2022. rewards: [steps], at each step's end. correct: [steps] bool.
    The unit is the step, which a batch counts as a token.
    """
    metrics: dict[str, Metric] = {
        **{"rewards/correct": (rewards, correct), "rewards/incorrect": (rewards, ~correct)},
        "rewards/accuracies": ((rewards > 0) == correct).to(rewards.dtype),
    }
    return Loss(torch.where(correct, softplus(-rewards), softplus(rewards)), unit="tokens", metrics=metrics)
