"""What an objective returns: its losses one by one, and what one of them is.

The loop alone divides, by the number of units in the whole step. That is why a loss comes unreduced and names its
unit: a mean taken here would be a mean over whatever happened to lie in this micro-batch. Metrics are averaged in the
same way, each over as many numbers as it has: the reward of chosen answers over the chosen ones alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

__all__ = ["DIFFERENCES", "Loss", "Metric", "Unit"]

Unit = Literal["tokens", "sequences", "pairs"]


Metric = Tensor | tuple[Tensor, Tensor]

DIFFERENCES = {"rewards/margins": ("rewards/chosen", "rewards/rejected")}
"""By name, the two means of which it is the difference, where an objective does not measure it by itself."""


@dataclass(frozen=True, slots=True)
class Loss:
    """per_unit: [units], in nats, not reduced.

    metrics: given by name as numbers of which the mean is wanted, [any], alone or with a mask of those that count, or
    as the mean over this batch's units, a scalar. kept: of each the sum and the number, [2], without gradient, which is
    what the loop adds up and divides.
    """

    per_unit: Tensor
    unit: Unit
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        kept = {name: _sum_and_number(value, self.per_unit.numel()) for name, value in self.metrics.items()}
        object.__setattr__(self, "kept", kept)


def _sum_and_number(metric: Metric, num_units: int) -> Tensor:
    values, mask = metric if isinstance(metric, tuple) else (metric, None)
    wide = values.detach().to(torch.promote_types(values.dtype, torch.float32))
    if mask is not None:
        return torch.stack([torch.where(mask, wide, 0).sum(), mask.sum().to(wide.dtype)])
    if wide.ndim:
        return torch.stack([wide.sum(), wide.new_tensor(wide.numel())])
    return torch.stack([wide * num_units, wide.new_tensor(num_units)])
