"""The judges that a recipe knows: who says which of two answers is better.

A further kind is one class here, one more member of `_Any`, and one more case in `evaluate/judges.py`. A secret never
stands in a recipe, which is copied into every run's folder: only the name of the environment variable that holds it.
"""

import re
from typing import Annotated, Literal, TypeAlias

from annotated_types import Ge, Gt
from pydantic import AfterValidator, BeforeValidator

from luthier.recipe.kinds import by_type
from luthier.recipe.settings import Count, Settings, Word, branches

__all__ = ["JUDGE_SETTINGS", "EndpointJudge", "JudgeSettings", "LocalJudge", "RewardJudge", "RuleJudge"]

_CRITERIA = "The better answer is correct, does what was asked and is clear. Length is no merit."


def _function(place: str) -> str:
    if re.fullmatch(r".*\.py:[A-Za-z_]\w*", place):
        return place
    raise ValueError(f'expected a function in a file, such as "judge.py:prefer", got "{place}"')


def _address(url: str) -> str:
    """Refused without showing it where it may hold a secret."""
    if set("@?#") & set(url):
        raise ValueError("expected an address without @, ? and #; a key belongs in an environment variable")
    if re.fullmatch(r"https?://[^/\s]+(/\S*)?", url):
        return url.rstrip("/")
    raise ValueError(f'expected an address such as "http://localhost:8000/v1", got "{url}"')


def _variable(name: str) -> str:
    """Capitals alone, so that most keys pasted by mistake are refused; and what was pasted is not shown."""
    if re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        return name
    raise ValueError("expected the name of an environment variable in capitals, such as OPENAI_API_KEY, never a key")


class RuleJudge(Settings):
    """A Python function gives each answer a number; the higher one is better."""

    type: Literal["rule"] = "rule"
    """A function in a file."""

    function: Annotated[Word, AfterValidator(_function)]
    """`file.py:function`, called as function(prompt, answer, row) -> float; the file's code is run."""


class RewardJudge(Settings):
    """A reward model gives each answer a number; the higher one is better."""

    type: Literal["reward"] = "reward"
    """A reward model."""

    model: Word
    """The reward model: the folder that a reward stage has saved, or another sequence classifier with one output."""


class LocalJudge(Settings):
    """A causal model reads both answers and names the better one."""

    type: Literal["local"] = "local"
    """A language model on this machine."""

    model: Word
    """The model that judges: an alias, a hub id, a folder or a .gguf file. Small ones prefer a place, not an answer."""

    criteria: Word = _CRITERIA
    """What makes an answer better, in words that the judge is told."""


class EndpointJudge(Settings):
    """A model behind an OpenAI-compatible server reads both answers and names the better one."""

    type: Literal["endpoint"] = "endpoint"
    """A server."""

    url: Annotated[Word, AfterValidator(_address)]
    """The server's address up to /v1; /chat/completions is added."""

    model: Word
    """The model's name there."""

    api_key_env: Annotated[Word, AfterValidator(_variable)] | None = None
    """The environment variable that holds the key; none for a server without keys."""

    criteria: Word = _CRITERIA
    """What makes an answer better, in words that the judge is told."""

    max_new_tokens: Count = 512
    """The longest reply, in tokens; a judge that thinks before it speaks needs more."""

    timeout_seconds: Annotated[float, Gt(0)] = 30.0
    """How long one reply may take."""

    retries: Annotated[int, Ge(0)] = 3
    """How often a question is asked again after a timeout, a lost connection, or the statuses 408, 429 and 5xx."""

    parallel: Count = 4
    """Questions that are asked at the same time."""


_Any: TypeAlias = RuleJudge | RewardJudge | LocalJudge | EndpointJudge

JUDGE_SETTINGS: dict[str, type[Settings]] = {kind.model_fields["type"].default: kind for kind in branches(_Any)}


def _by_type(value: object) -> object:
    return by_type(value, JUDGE_SETTINGS)


JudgeSettings = Annotated[_Any, BeforeValidator(_by_type)]
