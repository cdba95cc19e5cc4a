"""Whose run a folder holds: the resolved recipe in it says so, word by word, and the objective where it is the user's.

A run goes on only in its own folder. An objective from outside is not in the recipe's language; a comment above the
recipe has a digest of its code, so that an edited one is another run.
"""

import hashlib
import os
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType

from luthier.errors import RecipeError

__all__ = ["claim", "claimed_by", "digest_of_code", "give_back"]

_RECIPE = "recipe.yaml"
_PLAIN = (bool, bytes, complex, float, int, str, type(None))


def claimed_by(output: Path) -> str | None:
    """What the folder's run says of itself; None where the folder holds no run. Raises RecipeError."""
    try:
        path = output / _RECIPE
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
    except OSError as error:
        raise RecipeError(f"output: {output} cannot be read ({error.strerror}); choose another output") from error


def claim(output: Path, text: str) -> None:
    """Makes the folder this run's, whole or not at all. Raises RecipeError."""
    beside = output / f".{_RECIPE}.part"
    try:
        output.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, output / _RECIPE)
    except OSError as error:
        raise RecipeError(f"output: {output} cannot be written ({error.strerror}); choose another output") from error


def give_back(output: Path) -> None:
    """Makes the folder nobody's, unless one of its stages has a checkpoint to go on from."""
    if not any(output.glob("*/checkpoints/step-*")):
        (output / _RECIPE).unlink(missing_ok=True)


def digest_of_code(function: object) -> str:
    """SHA-256 of a function's code, its defaults and what it closes over; of functions that it calls by name, and of
    objects that are no plain values, only the names count.
    """
    return hashlib.sha256(_words(function).encode()).hexdigest()


def _words(value: object, *, inner: bool = False) -> str:
    """inner: of a function that another closes over, which may be that other again, only the code."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"({', '.join(_words(entry, inner=inner) for entry in value)})"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(_words(entry, inner=inner) for entry in value))}}}"
    if isinstance(value, dict):
        return _words(list(value.items()), inner=inner)
    if isinstance(value, CodeType):
        return f"{value.co_code.hex()} {value.co_names} {_words(value.co_consts)}"
    if isinstance(value, partial):
        return _words((value.func, value.args, value.keywords), inner=inner)
    if not isinstance(value, FunctionType):
        return f"{type(value).__module__}.{type(value).__qualname__}"
    closed_over = () if inner else tuple(cell.cell_contents for cell in value.__closure__ or ())
    bound = (value.__defaults__, value.__kwdefaults__, closed_over)
    return f"{value.__qualname__} {_words(value.__code__)} {_words(bound, inner=True)}"
