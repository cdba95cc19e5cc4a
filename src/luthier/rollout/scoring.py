"""A number for each answer, or the reason why it has none: one answer's failure is never the run's.

Numbers come from a Python function, or from a reward model. Whatever the function does (raises, exits, returns text or
NaN) becomes a Failure of that answer, with a reason short enough to be counted. A function that never returns is
stopped where it runs in a process of its own, which is `isolated.py`'s.
"""

import copy
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from luthier.data.examples import Chat, Message
from luthier.errors import DataError, RecipeError

__all__ = [
    "Answered",
    "Failure",
    "Rewards",
    "Rule",
    "Score",
    "ScoringFunction",
    "finite",
    "function_from",
    "guarded",
    "rule_by",
    "said",
    "scored_by",
    "scored_by_model",
]

ScoringFunction = Callable[[list[dict[str, Any]], str, dict[str, Any]], float]
"""function(prompt, answer, row): messages with role and content, the answer, and the row that the prompt stood in."""

Rewards = Callable[[Sequence[Chat]], Sequence[float]]
"""A reward model: one number for each conversation, which ends with the answer."""


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer to a conversation; row: what the prompt was read from, for functions that compare with it."""

    prompt: tuple[Message, ...]
    answer: str
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is nothing. reason: the same words for all failures of a kind; detail: of this one."""

    reason: str
    detail: str = ""


Score = float | Failure

Rule = Callable[[Answered], Score]
"""What gives one answer its number; it may raise."""


def function_from(place: str) -> ScoringFunction:
    """The function that `file.py:function` names; runs the file. Raises RecipeError."""
    file, _, name = place.rpartition(":")
    path = Path(file)
    if path.suffix != ".py" or not path.is_file():
        raise RecipeError(f"{place}: there is no Python file {file!r} in {Path.cwd()}; check the path")
    spec = importlib.util.spec_from_file_location(f"luthier function in {path.resolve()}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise RecipeError(f"{path}: cannot be run ({said(error)}); mend it") from error
    function = vars(module).get(name)
    if not callable(function):
        raise RecipeError(f"{path}: defines no function {name!r}; check the name after the colon")
    return function  # type: ignore[no-any-return]


def scored_by(function: ScoringFunction, answered: Sequence[Answered]) -> list[Score]:
    """The function's number for each answer, in their order. It gets copies, so it cannot change anybody's data."""
    return [guarded(rule_by(function), one) for one in answered]


def rule_by(function: ScoringFunction) -> Rule:
    """The function's number, where it returns one that is finite."""

    def rule(one: Answered) -> Score:
        prompt = [{"role": message.role, "content": message.content} for message in one.prompt]
        value: object = function(prompt, one.answer, copy.deepcopy(dict(one.row)))
        if not isinstance(value, Real | np.bool_):
            return Failure(f"returned {type(value).__name__}", "expected a number")
        return finite(float(value))

    return rule


def guarded(rule: Rule, one: Answered) -> Score:
    """The rule's number, or what it raised."""
    try:
        return rule(one)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        return Failure(f"raised {type(error).__name__}", said(error))


def scored_by_model(rewards: Rewards, answered: Sequence[Answered]) -> list[Score]:
    """The reward model's number for each answer, in their order; a conversation that it cannot be shown fails alone."""
    chats = [Chat((*one.prompt, Message("assistant", one.answer))) for one in answered]
    try:
        return [finite(reward) for reward in rewards(chats)] if chats else []
    except DataError as error:
        if len(chats) == 1:
            return [Failure("cannot be shown", str(error))]
    return [score for one in answered for score in scored_by_model(rewards, [one])]


def finite(number: float) -> Score:
    """The number, unless it is nan or infinite."""
    return number if math.isfinite(number) else Failure(f"returned {number}", "expected a finite number")


def said(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".removesuffix(": ")
