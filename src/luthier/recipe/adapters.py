"""Settings of the adapters, one class for each type.

A further type is one class here and one more member of `_Any`; recipes, flags, JSON Schema and the messages about
unknown types follow from that. `adapter: lora`, `adapter: {r: 8}` and `adapter: {type: lora, r: 8}` all mean LoRA.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from annotated_types import Ge, Gt, Lt
from pydantic import BeforeValidator, Field, ValidationError

from luthier.recipe.problems import Problem, Problems, problems_in, unknown
from luthier.recipe.settings import Count, Names, Settings, branches

__all__ = ["ADAPTER_SETTINGS", "AdapterSettings", "LoRA"]

_DEFAULT_TYPE = "lora"


def _customary_alpha(fields: dict[str, Any]) -> float:
    return 16.0 if fields.get("rs_scaling") else 2.0 * fields.get("r", 0)


class LoRA(Settings):
    """h = W x + (alpha / r) B A x        Hu et al. 2021, section 4.1"""

    type: Literal["lora"] = "lora"
    """Low-rank updates beside the frozen weights."""

    r: Count = 16
    """The rank of the update."""

    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """The share of the adapter's inputs that is dropped while training."""

    target_modules: Literal["all-linear"] | Names = "all-linear"
    """Which linear layers are adapted, by the end of their names; `all-linear` is all but the output layer."""

    rs_scaling: bool = False
    """Scales by alpha / sqrt(r) instead of alpha / r, so that high ranks learn as fast (Kalajdzievski 2023)."""

    alpha: Annotated[float, Gt(0)] = Field(default_factory=_customary_alpha)
    """The update's strength; by default 2 r (Biderman et al. 2024), or 16 with rs_scaling, which grows with r."""

    init: Literal["gaussian", "kaiming"] = "kaiming"
    """How A starts: uniform after He et al., or normal with deviation 1 / r. B starts at zero in both."""


_Any: TypeAlias = LoRA

ADAPTER_SETTINGS: dict[str, type[Settings]] = {kind.model_fields["type"].default: kind for kind in branches(_Any)}


def _by_type(value: object) -> object:
    """Settings of the class that `type` names; raises Problems."""
    fields = {"type": value} if isinstance(value, str) else value
    if not isinstance(fields, Mapping):
        return value
    kind = str(fields.get("type", _DEFAULT_TYPE))
    if kind not in ADAPTER_SETTINGS:
        path = ("type",) if fields is value else ()
        raise Problems([Problem(path, unknown("type", kind, list(ADAPTER_SETTINGS)))])
    try:
        return ADAPTER_SETTINGS[kind].model_validate(dict(fields))
    except ValidationError as error:
        raise Problems(problems_in(error, fields)) from None


AdapterSettings = Annotated[_Any, BeforeValidator(_by_type)]
