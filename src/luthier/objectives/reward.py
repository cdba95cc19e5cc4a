"""The loss of a reward model: of two answers the better one shall have the higher reward."""

from torch import Tensor
from torch.nn.functional import softplus

from luthier.objectives.loss import Loss

__all__ = ["bradley_terry"]


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
