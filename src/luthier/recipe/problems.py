"""What is wrong with a value, in one sentence that names the field and the nearest valid name.

Pydantic finds the errors; here each becomes a `Problem`: the path to the value as the user wrote it, and words without
library terms. The branches of a union count as one problem ("expected a whole number or "epoch""). Where the value
stands in a file or on a command line is added by who knows it (`document.py`, `flags.py`).
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

__all__ = ["Path", "Problem", "Problems", "dotted", "nearest", "problems_in", "unknown"]

Path = tuple[str | int, ...]

_MAX_SHOWN_CHARACTERS = 60
_PEERS_WORDS = {  # what other tools call our fields, where spelling alone would not lead there
    "base_model": "model",
    "cutoff_len": "max_length",
    "dataset": "data",
    "datasets": "data",
    "gradient_accumulation_steps": "batch_size",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_r": "r",
    "lora_target_modules": "target_modules",
    "lr": "learning_rate",
    "lr_scheduler": "schedule",
    "lr_scheduler_type": "schedule",
    "max_seq_len": "max_length",
    "max_seq_length": "max_length",
    "micro_batch_size": "batch_size",
    "model_name_or_path": "model",
    "num_train_epochs": "epochs",
    "output_dir": "output",
    "per_device_train_batch_size": "batch_size",
    "rank": "r",
    "save_total_limit": "keep_last",
    "sequence_len": "max_length",
    "use_rslora": "rs_scaling",
    "val_set_size": "eval_fraction",
    "warmup_steps": "warmup_ratio",
}
_EXPECTED = {  # by the kind of pydantic's error; words in braces come from its context
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "names with values (name: value)",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number",
    "int_type": "a whole number",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "model_attributes_type": "settings (name: value)",
    "model_type": "settings (name: value)",
    "string_too_short": "text that is not empty",
    "string_type": "text",
    "too_short": "at least one entry",
    "tuple_type": "a list",
}
_WRONG_KIND = ("_parsing", "_type")  # a branch of a union that the value was never meant for, once one fits ...
_LIMITS = ("greater_than", "less_than", "too_short")  # ... but for its size


@dataclass(frozen=True, slots=True)
class Problem:
    """One wrong value: the names and positions that lead to it, and what is wrong with it."""

    path: Path
    message: str

    def under(self, *steps: str | int) -> "Problem":
        """The same problem, seen from further out."""
        return Problem((*steps, *self.path), self.message)

    def __str__(self) -> str:
        return f"{dotted(self.path)}: {self.message}" if self.path else self.message


class Problems(ValueError):
    """Problems on their way out of a validator: a ValueError, because pydantic gathers no other kind of exception.

    Never reaches a user: `problems_in` takes it apart where a RecipeError is made of it.
    """

    def __init__(self, found: Iterable[Problem]) -> None:
        self.found = tuple(found)
        super().__init__("; ".join(map(str, self.found)))


def dotted(path: Path) -> str:
    """A path as users write it: `stages[0].sft.adapter.r`."""
    steps = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return steps.removeprefix(".")


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant, by the words of other tools and by spelling; None if none is near."""
    names = {name.casefold(): name for name in known}
    plain = word.casefold().replace("-", "_")
    if _PEERS_WORDS.get(plain) in names:
        return _PEERS_WORDS[plain]
    near = difflib.get_close_matches(plain, names, n=1) or difflib.get_close_matches(word.casefold(), names, n=1)
    return names[near[0]] if near else None


def unknown(kind: str, word: str, known: Sequence[str]) -> str:
    """`unknown field; did you mean "r"?`, or, where nothing is near, all that is known."""
    near = nearest(word, known)
    return f"unknown {kind}; " + (f'did you mean "{near}"?' if near else f"known are {', '.join(known)}")


def problems_in(error: ValidationError, value: object, known: Sequence[str] = ()) -> list[Problem]:
    """Every problem that pydantic found in `value`, each once, in its order.

    known: the names of the fields at the top of `value`, for what an unknown one may have meant.
    """
    found: list[Problem] = []
    wrong: dict[Path, list[Any]] = {}
    for detail in error.errors(include_url=False):
        path = _written_path(detail["loc"], value)
        inner = detail.get("ctx", {}).get("error")
        if isinstance(inner, Problems):
            found += [problem.under(*path) for problem in inner.found]
        elif detail["type"] != "default_factory_not_called":  # follows from another error
            wrong.setdefault(path, []).append(detail)
    paths = [*wrong, *(problem.path for problem in found)]
    deepest = [path for path in wrong if not any(other != path == other[: len(path)] for other in paths)]
    return list(dict.fromkeys([*(_problem(path, wrong[path], _reach(value, path), known) for path in deepest), *found]))


def _written_path(location: Iterable[str | int], value: object) -> Path:
    """The location without what pydantic adds to it (the branch of a union, `[key]`), which the user never wrote."""
    path: list[str | int] = []
    for step in location:
        inside = _inside(value, step)
        if inside or not path:
            path.append(step)
            value = inside[0] if inside else None
    return tuple(path)


def _inside(value: object, step: str | int) -> tuple[object, ...]:
    if isinstance(value, Mapping):
        return (value[step],) if step in value else ()
    if isinstance(value, list | tuple) and isinstance(step, int):
        return tuple(value[step : step + 1])
    return ()


def _reach(value: object, path: Path) -> object:
    for step in path:
        value = next(iter(_inside(value, step)), None)
    return value


def _problem(path: Path, details: list[Any], value: object, known: Sequence[str]) -> Problem:
    kind = details[0]["type"]
    if kind == "extra_forbidden":
        return Problem(path, unknown("field", str(path[-1]), known))
    if kind == "missing":
        return Problem(path, "is required; add it")
    if kind == "value_error":
        return Problem(path, str(details[0]["ctx"]["error"]))
    return Problem(path, _unexpected(details, value))


def _unexpected(details: list[Any], value: object) -> str:
    fitting = [detail for detail in details if not detail["type"].endswith(_WRONG_KIND)]
    beyond = any(limit in detail["type"] for detail in fitting for limit in _LIMITS)
    expected = " or ".join(dict.fromkeys(map(_expected, fitting if beyond else details)))
    near = nearest(value, [word for detail in details for word in _choices(detail)]) if isinstance(value, str) else None
    hint = f'; did you mean "{near}"?' if near else "; put it in quotes" if _wants_quotes(details, value) else ""
    return f"expected {expected}, got {_shown(value)}{hint}"


def _wants_quotes(details: list[Any], value: object) -> bool:
    return isinstance(value, int | float) and any(detail["type"] == "string_type" for detail in details)


def _expected(detail: Any) -> str:
    words = [f'"{word}"' for word in _choices(detail)]
    if words:
        return words[0] if len(words) == 1 else f"one of {', '.join(words)}"
    phrase = _EXPECTED.get(detail["type"])
    return phrase.format(**detail.get("ctx", {})) if phrase else detail["msg"].removeprefix("Input should be ")


def _choices(detail: Any) -> list[str]:
    return re.findall(r"'([^']*)'", detail.get("ctx", {}).get("expected", ""))


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "names with values"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= _MAX_SHOWN_CHARACTERS else text[:_MAX_SHOWN_CHARACTERS] + "..."
