"""What an objective returns: its losses one by one, and what one of them is.

The loop alone divides, by the number of units in the whole step. That is why a loss comes unreduced and names its
unit: a mean taken here would be a mean over whatever happened to lie in this micro-batch. Metrics are averaged in the
same way; here a mean does no harm, because the loss knows over how many units it was taken.
"""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

__all__ = ["Loss", "Unit"]

Unit = Literal["tokens", "sequences", "pairs"]


@dataclass(frozen=True, slots=True)
class Loss:
    """per_unit: [units], in nats, not reduced.

    metrics: given by name as one number a unit, [units], or as their mean, a scalar; kept as their sum over this
    batch's units, without gradient, which is what the loop adds up and divides.
    """

    per_unit: Tensor
    unit: Unit
    metrics: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sums = {name: _sum(value.detach(), self.per_unit.numel()) for name, value in self.metrics.items()}
        object.__setattr__(self, "metrics", sums)


def _sum(values: Tensor, num_units: int) -> Tensor:
    return values.sum() if values.ndim else values * num_units
