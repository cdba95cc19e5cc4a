"""Python functions given as rewards: settings say which function is meant, by the digest of its code.

So a run whose reward is a function in memory is a recipe like any other: it goes on where the function is the same, and
is another run where its code was edited.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from luthier.pipeline.claim import digest_of_code
from luthier.recipe.rewards import AnyReward, PythonReward
from luthier.rollout.scoring import ScoringFunction

__all__ = ["Functions", "GivenReward", "described"]

_Part: TypeAlias = str | Mapping[str, object] | AnyReward | ScoringFunction

GivenReward: TypeAlias = _Part | Sequence[_Part]
"""As in a recipe, a function called as reward(prompt, answer, row) -> float, or several of these."""

Functions: TypeAlias = Mapping[str, ScoringFunction]
"""Functions by the digest of their code."""


def described(reward: object) -> tuple[object, Functions]:
    """The reward with settings in the place of functions, and these; a reward without any is returned as it is."""
    parts = list(reward) if isinstance(reward, list | tuple) else [reward]
    functions: dict[str, ScoringFunction] = {digest_of_code(part): part for part in parts if callable(part)}
    if not functions:
        return reward, functions
    return [_settings(part) if callable(part) else part for part in parts], functions


def _settings(function: Callable[..., object]) -> PythonReward:
    return PythonReward(digest=digest_of_code(function), name=getattr(function, "__name__", "function"))
