"""Settings as the keywords of a Python function: what `help()` shows of it, made from the fields.

A field's name, type and default become a parameter, and the string under it the parameter's explanation, so that a
field is documented once for recipes, flags and Python.
"""

import inspect
import textwrap
from collections.abc import Collection
from typing import get_type_hints

from pydantic.fields import FieldInfo

from luthier.recipe.settings import Settings

__all__ = ["explanation_of", "parameters_of"]

_WIDTH = 100


class _Derived:
    """Stands in a signature for a default that follows from other fields; the explanation says how."""

    def __repr__(self) -> str:
        return "derived"


def parameters_of(cls: type[Settings], names: Collection[str]) -> list[inspect.Parameter]:
    """The named fields as keyword-only parameters, in the order of the class, without the limits of their values."""
    types = get_type_hints(cls)
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_default(field), annotation=types[name])
        for name, field in cls.model_fields.items()
        if name in names
    ]


def explanation_of(cls: type[Settings], names: Collection[str]) -> str:
    """One paragraph for each of the named fields, for a docstring."""
    fields = {name: field for name, field in cls.model_fields.items() if name in names}
    return "\n".join(
        textwrap.fill(f"{name}: {_one_line(field.description)}", _WIDTH, subsequent_indent="    ")
        for name, field in fields.items()
    )


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _default(field: FieldInfo) -> object:
    if field.is_required():
        return inspect.Parameter.empty
    return field.default if field.default_factory is None else _Derived()
