"""What an objective returns: its losses one by one, and what one of them is.

The loop alone divides, by the number of units in the whole step. That is why a loss comes unreduced and names its
unit: a mean taken here would be a mean over whatever happened to lie in this micro-batch.
"""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

__all__ = ["Loss", "Unit"]

Unit = Literal["tokens", "sequences", "pairs"]


@dataclass(frozen=True, slots=True)
class Loss:
    """per_unit: [units], in nats, not reduced. metrics: sums over this batch's units, without gradient."""

    per_unit: Tensor
    unit: Unit
    metrics: dict[str, Tensor] = field(default_factory=dict)
