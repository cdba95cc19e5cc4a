"""Whose run a folder holds: the resolved recipe in it says so, and the objective where it is the user's.

A run goes on only in its own folder, which is one where all that decides the run's numbers is equal, or where nothing
was trained yet. An objective from outside is not in the recipe's language; a comment above the recipe has a digest of
its code, so that an edited one is another run.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType

from luthier.errors import RecipeError
from luthier.files import ELSEWHERE, is_full, not_written, write_whole
from luthier.recipe.document import Stage, parse_recipe

__all__ = [
    "FREE_SETTINGS",
    "begins_anew",
    "claim",
    "claimed_by",
    "digest_of_code",
    "give_back",
    "goes_on",
    "has_trained",
]

FREE_SETTINGS = frozenset({"keep_last", "on_error", "output", "report_to", "resume", "watch"})
"""Settings that decide no number: they may differ between the parts of one run."""

_RECIPE = "recipe.yaml"
_TRAINED = ("*/checkpoints/step-*", "*/adapter", "*/done.json", "*/model", "*/rounds.json", "model")
_PLAIN = (bool, bytes, complex, float, int, str, type(None))


def claimed_by(output: Path) -> str | None:
    """What the folder's run says of itself; None where the folder holds no run. Raises RecipeError."""
    path = output / _RECIPE
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
    except OSError as error:
        raise RecipeError(f"output: {path} cannot be read ({error.strerror}); choose another output") from error


def claim(output: Path, text: str) -> None:
    """Makes the folder this run's, whole or not at all; a memory plan of a run that trained nothing is forgotten.

    Raises RecipeError.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not has_trained(output):
            for plan in output.glob("[0-9][0-9]-*/plan.json"):
                plan.unlink()
        write_whole(output / _RECIPE, text)
    except OSError as error:
        if is_full(error):
            raise RecipeError(f"output: {not_written(output, error, mend=ELSEWHERE)}") from error
        raise RecipeError(f"output: {output} cannot be written ({error.strerror}); choose another output") from error


def has_trained(output: Path) -> bool:
    """Whether the folder holds anything that training made: a checkpoint, an adapter, a model, a stage that is done."""
    return any(any(output.glob(pattern)) for pattern in _TRAINED)


def give_back(output: Path) -> None:
    """Makes the folder nobody's, unless something was trained there."""
    if not has_trained(output):
        (output / _RECIPE).unlink(missing_ok=True)


def goes_on(text: str, found: str) -> bool:
    """Whether the run that a recipe's text describes may go on in the folder that says `found`.

    From the first stage with `resume: false` on, which begins anew, only the words of the stages must be the same.
    """
    if text == found:
        return True
    try:
        ours, theirs = parse_recipe(text, name=_RECIPE).stages, parse_recipe(found, name=_RECIPE).stages
    except RecipeError:
        return False
    kept = begins_anew(ours)
    free = set(FREE_SETTINGS)
    return (
        _notes(text) == _notes(found)
        and [stage.word for stage in ours] == [stage.word for stage in theirs]
        and [stage.settings.model_dump(exclude=free) for stage in ours[:kept]]
        == [stage.settings.model_dump(exclude=free) for stage in theirs[:kept]]
    )


def begins_anew(stages: Sequence[Stage]) -> int:
    """The index of the first stage with `resume: false`; the number of stages where all go on."""
    return next((index for index, stage in enumerate(stages) if not stage.settings.resume), len(stages))


def _notes(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("#")]


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
