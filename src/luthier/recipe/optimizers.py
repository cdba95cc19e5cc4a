"""The optimizers that a recipe knows, by their words, and what sets some parameters apart from the others.

`optimizer: muon`, `optimizer: {type: muon}` and `optimizer: {type: muon, momentum: 0.9}` all mean Muon. Defaults are
those of the papers, but for Adafactor, whose sizes of steps are AdamW's unless `scale_parameter` is set.
"""

from typing import Annotated, ClassVar, Literal, Self, TypeAlias

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator, model_validator

from luthier.recipe.kinds import by_type
from luthier.recipe.problems import Problem, Problems
from luthier.recipe.settings import Settings, branches

__all__ = [
    "Adafactor",
    "Adam8bit",
    "AdamW",
    "AnyOptimizer",
    "Lion",
    "Muon",
    "NamedGroup",
    "OptimizerSettings",
    "ParameterGroup",
    "ScheduleFree",
]

_Kept = Annotated[float, Ge(0), Lt(1)]
_Positive = Annotated[float, Gt(0)]


class AnyOptimizer(Settings):
    """What every optimizer has."""

    type: str
    """Which optimizer."""

    rate_divisor: ClassVar[float] = 1.0  # by which a stage's usual learning rate is divided


class _WithAdamW(AnyOptimizer):
    beta1: _Kept = 0.9
    """How much of AdamW's mean of gradients is kept a step."""

    beta2: _Kept = 0.999
    """How much of AdamW's mean of squared gradients is kept a step."""

    epsilon: _Positive = 1e-8
    """What AdamW adds to its divisor."""


class AdamW(_WithAdamW):
    """Each weight's mean gradient over the root of its mean square (Loshchilov and Hutter 2019)."""

    type: Literal["adamw"] = "adamw"
    """AdamW."""


class Adam8bit(_WithAdamW):
    """AdamW whose moments take one byte each and not four (Dettmers et al. 2022)."""

    type: Literal["adam8bit"] = "adam8bit"
    """AdamW in 8 bits."""

    stable_embedding: bool = True
    """Whether the moments of embeddings, whose gradients vary most, stay in four bytes."""


class Adafactor(AnyOptimizer):
    """The squares of a matrix's gradients by row and by column alone, and no mean (Shazeer and Stern 2018)."""

    type: Literal["adafactor"] = "adafactor"
    """Adafactor."""

    decay_exponent: Annotated[float, Gt(0), Le(1)] = 0.8
    """The mean of squares keeps 1 - t^-exponent at step t."""

    clip: Annotated[float, Gt(0)] = 1.0
    """The greatest root mean square of a parameter's step, in units of the learning rate."""

    scale_parameter: bool = False
    """Whether the learning rate is a share of each parameter's own size, as in the paper; a usual one is then 1e-3."""

    epsilon: _Positive = 1e-30
    """What is added to squared gradients."""


class Lion(AnyOptimizer):
    """The sign of a mean of gradients (Chen et al. 2023)."""

    rate_divisor: ClassVar[float] = 5.0  # section 5: 3 to 10 times lower than AdamW's

    type: Literal["lion"] = "lion"
    """Lion."""

    beta1: _Kept = 0.9
    """The mean's share in the step, beside the newest gradient's."""

    beta2: _Kept = 0.99
    """How much of the mean is kept a step."""


class Muon(_WithAdamW):
    """The mean gradient of each matrix in the layers with all its singular values made one (Jordan et al. 2024), as
    large as a step of AdamW (Liu et al. 2025); AdamW for all else.
    """

    type: Literal["muon"] = "muon"
    """Muon for matrices in the layers, AdamW for the rest."""

    momentum: _Kept = 0.95
    """How much of a matrix's mean gradient is kept a step."""


class ScheduleFree(_WithAdamW):
    """AdamW whose weights are averaged in place of a learning rate that falls (Defazio et al. 2024)."""

    type: Literal["schedule_free"] = "schedule_free"
    """AdamW without a schedule."""

    beta1: Annotated[float, Gt(0), Lt(1)] = 0.9
    """The average's share in the weights whose gradient is taken, beside the newest ones'."""


class ParameterGroup(Settings):
    """What is otherwise for parameters whose names fit a pattern."""

    rate_ratio: _Positive | None = None
    """By what their learning rate is multiplied, besides what their adapter and their layer ask for."""

    weight_decay: Annotated[float, Ge(0)] | None = None
    """Their decay, in place of the usual one."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.rate_ratio is None and self.weight_decay is None:
            raise Problems([Problem((), "says nothing; give rate_ratio, weight_decay or both")])
        return self


_OTHER_WORDS = {  # what people call an optimizer that has another name here
    "adam": "it is adamw, with weight_decay: 0",
    "adamw_8bit": "it is adam8bit",
    "adamw_bnb_8bit": "it is adam8bit",
    "adamw_torch": "it is adamw",
    "adamw_torch_fused": "it is adamw",
    "paged_adamw_32bit": "it is adamw, with offload_optimizer: memory",
    "paged_adamw_8bit": "it is adam8bit",
    "schedulefree": "it is schedule_free",
}

_Any: TypeAlias = AdamW | Adam8bit | Adafactor | Lion | Muon | ScheduleFree
_KINDS: dict[str, type[Settings]] = {kind.model_fields["type"].default: kind for kind in branches(_Any)}


def _by_type(value: object) -> object:
    return by_type(value, _KINDS, default="adamw", other_words=_OTHER_WORDS)


def _as_group(value: object) -> object:
    """A number, or its text, stands for the ratio alone, so that a flag can say it."""
    return {"rate_ratio": value} if isinstance(value, bool | float | int | str) else value


OptimizerSettings = Annotated[_Any, BeforeValidator(_by_type)]
NamedGroup = Annotated[ParameterGroup, BeforeValidator(_as_group, json_schema_input_type=ParameterGroup | _Positive)]
