"""Scales against what narrow types cannot hold: of the loss, for fp16, and of single tensors, for eight bits.

Half of all gradients of a small model lie below what fp16 can hold. The loss is multiplied before the backward pass
and the gradients are divided after it, in float32. `loss_scaling: dynamic`, `{initial: 1024}` and
`{type: dynamic, initial: 1024}` all mean a scale that is sought while training; `none` leaves the loss as it is.

Eight bits have room for so little that each layer's input, weight and gradient has a scale of its own. `fp8: delayed`,
`{window: 32}` and `{type: delayed, window: 32}` all mean one that follows from the steps before.
"""

from functools import partial
from typing import Annotated, Literal, Self, TypeAlias

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator, model_validator

from luthier.recipe.kinds import by_type
from luthier.recipe.problems import Problem, Problems
from luthier.recipe.settings import Count, Settings, Word, branches

__all__ = ["FP8", "CurrentFP8", "DelayedFP8", "DynamicScaling", "LossScaling", "StaticScaling"]

_Margin = Annotated[int, Ge(0), Le(8)]
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


class DelayedFP8(Settings):
    """Products in eight bits, each tensor's scale from the greatest entries of the steps before."""

    type: Literal["delayed"] = "delayed"
    """That scales follow from the steps before: all micro-batches of a step have the same ones."""

    window: Count = 16
    """How many steps are looked back on; a tensor that outgrows them is cut off for a step."""

    margin: _Margin = 0
    """By how many powers of two scales stay below what the greatest entry allows."""

    skip: tuple[Word, ...] = ()
    """Linear layers that keep the type of the others, as patterns of names (`*.down_proj`)."""


class CurrentFP8(Settings):
    """Products in eight bits, each tensor's scale from its own greatest entry."""

    type: Literal["current"] = "current"
    """That scales follow from the tensors at hand, so nothing is cut off; a second look at each."""

    margin: _Margin = 0
    """By how many powers of two scales stay below what the greatest entry allows."""

    skip: tuple[Word, ...] = ()
    """Linear layers that keep the type of the others, as patterns of names (`*.down_proj`)."""


_AnyScaling: TypeAlias = DynamicScaling | StaticScaling
_AnyFP8: TypeAlias = DelayedFP8 | CurrentFP8


def _told_apart(kinds: object, *, default: str) -> BeforeValidator:
    by_word: dict[str, type[Settings]] = {kind.model_fields["type"].default: kind for kind in branches(kinds)}
    return BeforeValidator(partial(by_type, kinds=by_word, default=default))


LossScaling = Annotated[_AnyScaling, _told_apart(_AnyScaling, default="dynamic")]
FP8 = Annotated[_AnyFP8, _told_apart(_AnyFP8, default="delayed")]
