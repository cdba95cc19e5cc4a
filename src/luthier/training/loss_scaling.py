"""Loss scaling: what keeps the small gradients of a float16 network from becoming zero.

The loss is multiplied by a scale before the backward pass; the gradients, by then in float32, are divided by it before
anybody looks at them. A scale that is too great makes a gradient overflow: that step is left out, and the scale falls.
It is a state of two numbers and a function to the next; whoever trains keeps them. The program learns of an overflow
together with the step's metrics, so nothing waits for it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from luthier.recipe.precision import DynamicScaling, LossScaling

__all__ = ["LossScale", "backward", "can_fall", "first_scale", "next_scale", "unscale"]


@dataclass(frozen=True, slots=True)
class LossScale:
    """scale: by what the loss is multiplied. good_steps: steps in a row without an overflow, since it last grew."""

    scale: float = 1.0
    good_steps: int = 0


def first_scale(settings: LossScaling | None) -> LossScale:
    """Where training starts; without settings the loss stays as it is, for good."""
    if settings is None:
        return LossScale()
    return LossScale(settings.initial if isinstance(settings, DynamicScaling) else settings.scale)


def next_scale(now: LossScale, settings: LossScaling | None, *, finite: bool) -> LossScale:
    """s <- max(backoff * s, floor) after an overflow; s <- min(growth * s, ceiling) after `interval` steps without

    (Micikevicius et al. 2018, section 3.2; the update of torch.amp.GradScaler, but for floor and ceiling.) Without
    settings, and with static ones, the scale stays.
    """
    if not isinstance(settings, DynamicScaling):
        return now
    if not finite:
        return LossScale(max(settings.backoff * now.scale, settings.floor))
    if now.good_steps + 1 < settings.interval:
        return LossScale(now.scale, now.good_steps + 1)
    return LossScale(min(settings.growth * now.scale, settings.ceiling))


def can_fall(now: LossScale, settings: LossScaling | None) -> bool:
    """Whether an overflow may be the scale's fault, and the next step go better."""
    return isinstance(settings, DynamicScaling) and now.scale > settings.floor


def backward(loss: Tensor, scale: float) -> None:
    """Adds the gradients of scale * loss to the parameters. loss: a number, float32 so that the product fits."""
    (loss if scale == 1.0 else loss * scale).backward()


@torch.no_grad()
def unscale(parameters: Iterable[nn.Parameter], scale: float) -> None:
    """g <- g / scale in place, for the gradients that are there. What is not finite stays so."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    assert all(g.dtype.itemsize >= torch.float32.itemsize for g in gradients), "small gradients would become zero"
    if gradients and scale != 1.0:
        torch._foreach_mul_(gradients, 1.0 / scale)
