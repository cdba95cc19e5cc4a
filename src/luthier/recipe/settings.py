"""The base of every settings class, and how people may write a value.

Settings are frozen, know all their fields and document each once, in a string under it. What holds for all of them is
said here: `none` is nothing, and so are `no` and `off` where neither text nor a switch is meant; one name stands for a
list of one; true is no number; every error of a class is gathered before any is raised. Numbers may come as text,
because flags do and because YAML 1.1 takes `2e-5` for text.
"""

import json
from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin

from annotated_types import Ge, Le, MinLen
from pydantic import (
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic.functional_validators import ModelWrapValidatorHandler
from pydantic_core import CoreSchema

from luthier.errors import RecipeError
from luthier.recipe.problems import Problems, problems_in

__all__ = [
    "Count",
    "Names",
    "Settings",
    "Share",
    "Word",
    "branches",
    "flat",
    "settings_from",
    "short_forms",
    "type_names",
]

Count = Annotated[int, Ge(1)]
Share = Annotated[float, Ge(0), Le(1)]
Word = Annotated[str, MinLen(1)]
Names = Annotated[tuple[Word, ...], MinLen(1)]


class Settings(BaseModel):
    """Frozen settings that refuse what they do not know and say every error at once."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, defer_build=True
    )

    def __init__(self, /, **values: Any) -> None:
        """Settings by their fields' names; raises RecipeError with one line for each field that is wrong."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise RecipeError(_sentences(error, values)) from None

    short_form: ClassVar[str | None] = None
    """The field that a word, or a list of words, in place of these settings means."""

    # pydantic's own mark: settings within others are validated without __init__, and their errors are gathered
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @model_validator(mode="wrap")
    @classmethod
    def _say_every_problem(cls, value: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if cls.short_form is not None and isinstance(value, str | list | tuple):
            value = {cls.short_form: value}
        try:
            return handler(_as_meant(value, cls.model_fields))
        except ValidationError as error:
            raise Problems(problems_in(error, value, tuple(cls.model_fields))) from None

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core_schema)
        for name, described in handler.resolve_ref_schema(schema).get("properties", {}).items():
            annotation = cls.model_fields[name].annotation
            if short_forms(annotation):
                described["anyOf"] += [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]
            _admit_as_written(described, type_names(annotation))
        return schema


S = TypeVar("S", bound=Settings)


def settings_from(cls: type[S], values: Mapping[str, object]) -> S:
    """Settings made of plain values; raises RecipeError with one line for each field that is wrong."""
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        raise RecipeError(_sentences(error, values)) from None


def _sentences(error: ValidationError, values: Mapping[str, object]) -> str:
    return "\n".join(map(str, problems_in(error, values)))


def branches(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation admits, one by one: `Annotated[int, ...] | None` gives `(int, NoneType)`."""
    if get_origin(annotation) is Annotated:
        return branches(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(leaf for member in get_args(annotation) for leaf in branches(member))
    return (annotation,)


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Plain values as text, those of nested settings under dotted names: `adapter.r` and `16`."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def type_names(annotation: Any) -> list[str]:
    """The words for the settings that an annotation admits, where these are told apart by a field `type`."""
    kinds = [kind for kind in branches(annotation) if isinstance(kind, type) and issubclass(kind, Settings)]
    return [str(kind.model_fields["type"].default) for kind in kinds if "type" in kind.model_fields]


def short_forms(annotation: Any) -> list[str]:
    """The fields that bare words mean, of the settings that an annotation admits."""
    kinds = [kind for kind in branches(annotation) if isinstance(kind, type) and issubclass(kind, Settings)]
    return [kind.short_form for kind in kinds if kind.short_form is not None]


def _as_meant(values: object, fields: Mapping[str, FieldInfo]) -> object:
    if not isinstance(values, Mapping):
        return values
    return {
        name: _value_as_meant(value, branches(fields[name].annotation)) if name in fields else value
        for name, value in values.items()
    }


def _value_as_meant(value: object, admitted: tuple[Any, ...]) -> object:
    if NoneType in admitted and (value == "none" or (_is_no(value) and not {bool, str} & set(admitted))):
        return None
    if isinstance(value, bool) and bool not in admitted and {int, float} & set(admitted):
        return str(value)  # text that is no number: pydantic would take True for 1
    if isinstance(value, str) and str not in admitted and not _is_choice(value, admitted):
        return (value,) if any(get_origin(kind) is tuple for kind in admitted) else value
    return value


def _is_no(value: object) -> bool:
    return value is False or (isinstance(value, str) and value in ("no", "off"))


def _is_choice(value: str, admitted: tuple[Any, ...]) -> bool:
    return any(get_origin(kind) is Literal and value in get_args(kind) for kind in admitted)


def _admit_as_written(described: dict[str, Any], words: list[str]) -> None:
    """Lets a field's JSON Schema admit what people may write: `none`, a type's word, one entry without a list."""
    if described.get("type") == "array":
        array = {key: described.pop(key) for key in ("type", "items", "minItems") if key in described}
        described["anyOf"] = [array]
    forms = described.get("anyOf", [])
    forms += [form["items"] for form in forms if "items" in form and form["items"] not in forms]
    forms += [{"const": "none"}] if {"type": "null"} in forms else []
    forms += [{"enum": words}] if words else []
