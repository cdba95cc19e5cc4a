"""What all functions that take settings as keywords have in common: how these are read, shown and explained."""

import inspect
import os
from collections.abc import Callable, Mapping, Set
from typing import Any, TypeVar

from luthier.errors import RecipeError
from luthier.models.load import Model
from luthier.pipeline.live import dtype_of
from luthier.recipe.keywords import explanation_of, parameters_of
from luthier.recipe.settings import Settings, settings_from

__all__ = ["MODELS_OWN", "explained", "settings_for", "with_paths_as_text"]

MODELS_OWN = frozenset({"model", "dtype"})
"""Settings that a model in memory decides."""

_Settings = TypeVar("_Settings", bound=Settings)


def settings_for(model: Model, kind: type[_Settings], given: Mapping[str, object]) -> _Settings:
    """Settings for a model that is in memory already: its name and type are the model's. Raises RecipeError."""
    dtype = dtype_of(model)
    settings = settings_from(kind, {"dtype": dtype, **with_paths_as_text(given), "model": model.source.name})
    wanted = settings.model_dump(include={"dtype"})["dtype"]
    if wanted != dtype:
        raise RecipeError(f"dtype: the model is in memory in {dtype}; load it with dtype {wanted}")
    return settings


def with_paths_as_text(given: Mapping[str, object]) -> dict[str, object]:
    """Recipes know text alone; Python has paths, and lists of them."""
    return {
        name: [_path_as_text(entry) for entry in value] if isinstance(value, list | tuple) else _path_as_text(value)
        for name, value in given.items()
    }


def _path_as_text(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def explained(function: Callable[..., Any], kind: type[Settings], names: Set[str]) -> Callable[..., Any]:
    """The function with these settings in its signature and docstring, in place of `**given`."""
    signature = inspect.signature(function)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    shown = names - signature.parameters.keys()
    parameters = sorted([*own, *parameters_of(kind, shown)], key=lambda p: (p.kind, p.default is not p.empty))
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    function.__doc__ = f"{inspect.getdoc(function)}\n\n{explanation_of(kind, shown)}\n"
    return function
