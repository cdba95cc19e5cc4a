"""How a loss is scaled against underflow, where a network computes in fp16.

Half of all gradients of a small model lie below what fp16 can hold. The loss is multiplied before the backward pass
and the gradients are divided after it, in float32. `loss_scaling: dynamic`, `{initial: 1024}` and
`{type: dynamic, initial: 1024}` all mean a scale that is sought while training; `none` leaves the loss as it is.
"""

from typing import Annotated, Literal, Self, TypeAlias

from annotated_types import Gt, Lt
from pydantic import BeforeValidator, model_validator

from luthier.recipe.kinds import by_type
from luthier.recipe.problems import Problem, Problems
from luthier.recipe.settings import Count, Settings, branches

__all__ = ["DynamicScaling", "LossScaling", "StaticScaling"]

_Positive = Annotated[float, Gt(0)]


class DynamicScaling(Settings):
    """A scale that grows until gradients overflow, and then falls."""

    type: Literal["dynamic"] = "dynamic"
    """That the scale is sought while training."""

    initial: _Positive = 2.0**16
    """The scale of the first step."""

    growth: Annotated[float, Gt(1)] = 2.0
    """By what the scale is multiplied after `interval` steps in a row without an overflow."""

    backoff: Annotated[float, Gt(0), Lt(1)] = 0.5
    """By what the scale is multiplied after an overflow, whose step is left out."""

    interval: Count = 2000
    """So many steps in a row without an overflow let the scale grow."""

    floor: _Positive = 1.0
    """The smallest scale; an overflow there ends the training."""

    ceiling: _Positive = 2.0**24
    """The greatest scale."""

    @model_validator(mode="after")
    def _lies_between(self) -> Self:
        if not self.floor <= self.initial <= self.ceiling:
            message = f"{self.initial:g} is not between the floor {self.floor:g} and the ceiling {self.ceiling:g}"
            raise Problems([Problem(("initial",), message)])
        return self


class StaticScaling(Settings):
    """A scale that stays."""

    type: Literal["static"] = "static"
    """That the scale stays as it is."""

    scale: _Positive = 2.0**16
    """By what the loss is multiplied."""


_Any: TypeAlias = DynamicScaling | StaticScaling
_KINDS: dict[str, type[Settings]] = {kind.model_fields["type"].default: kind for kind in branches(_Any)}


def _by_type(value: object) -> object:
    return by_type(value, _KINDS, default="dynamic")


LossScaling = Annotated[_Any, BeforeValidator(_by_type)]
