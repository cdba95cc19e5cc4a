"""The judges that a recipe knows: who says which of two answers is better.

A further kind is one class here, one more member of `_Any`, and one more case in `evaluate/judges.py`.
"""

from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator

from luthier.recipe.kinds import by_type
from luthier.recipe.servers import FunctionPlace, Seconds, Server
from luthier.recipe.settings import Settings, Word, branches

__all__ = ["JUDGE_SETTINGS", "EndpointJudge", "JudgeSettings", "LocalJudge", "RewardJudge", "RuleJudge"]

_CRITERIA = "The better answer is correct, does what was asked and is clear. Length is no merit."


class RuleJudge(Settings):
    """A Python function gives each answer a number; the higher one is better."""

    type: Literal["rule"] = "rule"
    """A function in a file."""

    function: FunctionPlace
    """`file.py:function`, called as function(prompt, answer, row) -> float; the file's code is run."""

    timeout_seconds: Seconds = 10.0
    """How long one call may take; a function that takes longer is stopped, and the answer has no number."""


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


class EndpointJudge(Server):
    """A model behind an OpenAI-compatible server reads both answers and names the better one."""

    type: Literal["endpoint"] = "endpoint"
    """A server."""

    criteria: Word = _CRITERIA
    """What makes an answer better, in words that the judge is told."""


_Any: TypeAlias = RuleJudge | RewardJudge | LocalJudge | EndpointJudge

JUDGE_SETTINGS: dict[str, type[Settings]] = {kind.model_fields["type"].default: kind for kind in branches(_Any)}


def _by_type(value: object) -> object:
    return by_type(value, JUDGE_SETTINGS)


JudgeSettings = Annotated[_Any, BeforeValidator(_by_type)]
