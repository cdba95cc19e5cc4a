"""Which ranks stay where layers share a budget of them: AdaLoRA's importance, schedule and choice.

The numbers are those of PEFT's RankAllocator; steps are counted from 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from luthier.adapters.base import Step
from luthier.recipe.adapters import AdaLoRA as Settings

__all__ = ["Importance", "budget_at", "highest", "last_choice"]


class Importance(nn.Module):
    """Of a parameter's entries, while training: I <- beta1 I + (1 - beta1) |p g|, and how unsure that is,
    U <- beta2 U + (1 - beta2) | |p g| - I |; the score is I U        Zhang et al. 2023, eq. 8 to 11
    """

    mean: Tensor
    uncertainty: Tensor

    def __init__(self, parameter: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros_like(parameter.detach()))
        self.register_buffer("uncertainty", torch.zeros_like(parameter.detach()))

    def update(self, product: Tensor, beta1: float, beta2: float) -> None:
        """product: p g of this step, which is overwritten."""
        sensitivity = product.abs_()
        self.mean.mul_(beta1).add_(sensitivity, alpha=1 - beta1)
        self.uncertainty.mul_(beta2).add_(sensitivity.sub_(self.mean).abs_(), alpha=1 - beta2)

    def scores(self) -> Tensor:
        """Of each entry."""
        return self.mean * self.uncertainty


def budget_at(settings: Settings, num_layers: int, step: Step) -> int | None:
    """b = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_f - t_i))^3        Zhang et al. 2023, eq. 12

    The ranks that all layers together shall have left after this step; None where they stay as they are.
    """
    number, first, last = step.index + 1, int(settings.warmup_ratio * step.num_steps), last_choice(settings, step)
    if number <= first or (number < last and number % settings.prune_every):
        return None
    target = settings.target_r * num_layers
    share = 1 - (min(number, last) - first) / (last - first)
    return int((settings.init_r * num_layers - target) * share**3 + target)


def last_choice(settings: Settings, step: Step) -> int:
    """The number of the step after which the ranks stay."""
    return step.num_steps - int(settings.final_ratio * step.num_steps)


def highest(scores: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Which of all layers' scores are among so many highest ones; of equal ones at the edge none is."""
    together = torch.cat(list(scores))
    if budget == len(together):
        return [torch.ones_like(own, dtype=torch.bool) for own in scores]
    threshold = together.kthvalue(len(together) - budget).values
    return [own > threshold for own in scores]
