"""The rewards that a recipe knows: what gives an answer its number.

`reward: exact`, `reward: rewards.py:score`, `reward: {type: math, column: answer}` and a list of such parts are all
rewards; of a list, the weighted numbers are added. A further kind is one class here, one more member of `_Any`, and
its row in `rollout/rules.py` or its case in `rollout/rewards.py`.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeAlias

from annotated_types import Ge, MinLen
from pydantic import AfterValidator, BeforeValidator, Field, GetJsonSchemaHandler, field_validator, model_validator
from pydantic_core import CoreSchema

from luthier.recipe.kinds import by_type
from luthier.recipe.problems import Problem, Problems
from luthier.recipe.servers import FunctionPlace, Seconds, Server
from luthier.recipe.settings import Count, Settings, Word, branches

__all__ = [
    "REWARD_SETTINGS",
    "AnyReward",
    "CodeReward",
    "ComparedReward",
    "ExactReward",
    "FunctionReward",
    "JsonReward",
    "JudgeReward",
    "LengthReward",
    "MathReward",
    "ModelReward",
    "NumericReward",
    "PythonReward",
    "RegexReward",
    "RewardSettings",
    "TagsReward",
    "parts_of",
]

_CRITERIA = "The answer is correct, does what was asked and is clear. Length is no merit."


class AnyReward(Settings):
    """What every reward knows."""

    type: str
    """Which reward it is."""

    weight: float = 1.0
    """What its number is multiplied by before the parts of a reward are added."""

    name: Word | None = None
    """What its metric is called; its type where not given."""

    @property
    def called(self) -> str:
        """The name of its metric."""
        return self.name or self.type


class ComparedReward(AnyReward):
    """What rewards that compare with a column know."""

    column: Word = "answer"
    """The column of the row that holds what is right."""

    tag: Word | None = None
    """Only what stands in the last <tag>...</tag> of the answer is compared; without one, the answer is wrong."""

    @field_validator("tag")
    @classmethod
    def _names_a_tag(cls, tag: str | None) -> str | None:
        return tag if tag is None else _tag(tag)


def _tag(name: str) -> str:
    if re.fullmatch(r"[\w.:-]+", name):
        return name
    raise ValueError(f'expected the bare name of a tag, such as "answer", got "{name}"')


class LengthReward(AnyReward):
    """1 at the aim or up to the maximum; beyond, less by the share of it that the length is off, down to 0."""

    type: Literal["length"] = "length"
    """The answer's length."""

    aim: Count | None = None
    """The length that is best: max(0, 1 - |length - aim| / aim)."""

    maximum: Count | None = None
    """The length up to which nothing is lost: max(0, 1 - max(0, length - maximum) / maximum)."""

    unit: Literal["characters", "tokens"] = "characters"
    """What is counted."""

    @model_validator(mode="after")
    def _know_one_length(self) -> Self:
        if (self.aim is None) == (self.maximum is None):
            raise Problems([Problem(("aim",), "give either aim or maximum")])
        return self


class JsonReward(AnyReward):
    """1 for an answer, or one fenced block that is all of it, that is strict JSON and holds to the schema, if any."""

    type: Literal["json"] = "json"
    """Whether the answer is JSON."""

    json_schema: dict[str, Any] = Field(default={})
    """A JSON Schema that it must hold to."""

    schema_file: Word | None = None
    """The file of a JSON Schema that it must hold to."""

    timeout_seconds: Seconds = 10.0
    """How long one answer may be compared with the schema."""

    @model_validator(mode="after")
    def _know_one_schema(self) -> Self:
        if self.json_schema and self.schema_file is not None:
            raise Problems([Problem(("schema_file",), "json_schema says another; leave one of the two out")])
        return self


class RegexReward(AnyReward):
    """1 for an answer that the pattern matches."""

    type: Literal["regex"] = "regex"
    """Whether a pattern matches."""

    pattern: Word
    """A regular expression as Python writes it; (?s) at its start lets the dot match line ends."""

    match: Literal["search", "start", "full"] = "search"
    """Where it must match: anywhere, at the answer's start, or the whole answer."""

    timeout_seconds: Seconds = 10.0
    """How long one answer may be searched."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f'expected a regular expression, got "{pattern}": {error}') from None
        return pattern


class TagsReward(AnyReward):
    """1 for <think>...</think> <answer>...</answer>: all tags in order, each once, and nothing outside of them."""

    type: Literal["tags"] = "tags"
    """Whether the answer is written in tags."""

    tags: Annotated[tuple[Annotated[Word, AfterValidator(_tag)], ...], MinLen(1)] = ("think", "answer")
    """The names of the tags, in their order."""

    @field_validator("tags")
    @classmethod
    def _stand_once(cls, tags: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(tags)) < len(tags):
            raise ValueError("expected each tag once")
        return tags


class ExactReward(ComparedReward):
    """1 for an answer that equals the column's text, or one of its texts; only white space and case may differ."""

    type: Literal["exact"] = "exact"
    """Whether the text is right."""

    ignore_case: bool = True
    """Whether capitals count as small letters."""


class NumericReward(ComparedReward):
    """1 for an answer whose number equals the column's."""

    type: Literal["numeric"] = "numeric"
    """Whether the number is right."""

    where: Literal["any", "marker", "boxed", "last"] = "any"
    r"""Which number of the answer counts: behind the last marker, in the last \boxed{}, the last of all, or the first
    of these that there is. The column is always read as `any`."""

    marker: Word = "####"
    """What stands before the number, as GSM8K has it."""

    tolerance: Annotated[float, Ge(0)] = 0.0
    """How far apart equal numbers may be."""


class MathReward(ComparedReward):
    """1 for an answer that is mathematically equal to the column's, by the library math-verify."""

    type: Literal["math"] = "math"
    """Whether the expression is right."""

    marker: Word = "####"
    """Where it stands in a text, only what is behind it is read."""

    timeout_seconds: Seconds = 10.0
    """How long one comparison may take."""


class ModelReward(AnyReward):
    """A reward model's number for the conversation."""

    type: Literal["model"] = "model"
    """A reward model."""

    model: Word | None = None
    """The folder that a reward stage has saved, or another sequence classifier with one output; with an adapter, what
    that was trained on."""

    adapter: Word | None = None
    """The adapter that a reward stage has trained. Without `model` it was trained on the very model that the stage
    here begins with, which then has it beside its own: one set of weights for both."""

    @model_validator(mode="after")
    def _has_weights(self) -> Self:
        if self.model is None and self.adapter is None:
            raise Problems([Problem(("model",), "name a reward model, or the adapter of one")])
        return self


class FunctionReward(AnyReward):
    """What a Python function in a file gives; it runs in a process of its own."""

    type: Literal["function"] = "function"
    """A function in a file."""

    function: FunctionPlace
    """`file.py:function`, called as reward(prompt, completion, row) -> float; the file's code is run."""

    timeout_seconds: Seconds = 10.0
    """How long one call may take."""

    memory_gb: Seconds = 8.0
    """How much memory it may have."""


class PythonReward(AnyReward):
    """What a Python function gives that is in memory already, as a program hands it to `luthier.grpo` and its kin."""

    type: Literal["python"] = "python"
    """A function of the calling program; it cannot be named in a file or in a flag, where `function` is."""

    digest: Word
    """The SHA-256 of its code, by which it is found, and by which an edited one is another run."""


class CodeReward(AnyReward):
    """The share of tests that the answer's last fenced block, or the whole answer, passes in a closed-off process."""

    type: Literal["code"] = "code"
    """Whether the program passes tests."""

    column: Word = "tests"
    """The column of the row that holds the tests: a Python text, which is one test, or a list of them."""

    entry_point: Word | None = None
    """The column that names the function with which the tests' `check(candidate)` is called, as HumanEval has it."""

    score: Literal["all", "share"] = "all"
    """1 if all tests pass and else 0, or the share that passes."""

    timeout_seconds: Seconds = 10.0
    """How long all tests of one answer may take."""

    memory_gb: Seconds = 1.0
    """How much memory they may have."""

    parallel: Count = 4
    """Answers that are tested at the same time."""


class JudgeReward(AnyReward, Server):
    """A number from 0 to 1 that a model behind an OpenAI-compatible server gives."""

    type: Literal["judge"] = "judge"
    """A server."""

    criteria: Word = _CRITERIA
    """What makes an answer good, in words that the judge is told."""

    scale: Count = 10
    """The judge is asked for a number from 0 to this, which is divided by it."""


_Exactly: TypeAlias = ExactReward | NumericReward | MathReward
_Formed: TypeAlias = LengthReward | JsonReward | RegexReward | TagsReward
_Run: TypeAlias = FunctionReward | PythonReward | CodeReward
_Any: TypeAlias = _Exactly | _Formed | _Run | ModelReward | JudgeReward

REWARD_SETTINGS: dict[str, type[AnyReward]] = {kind.model_fields["type"].default: kind for kind in branches(_Any)}


class _AsWritten:
    """Lets the JSON Schema of a reward admit words: a type's, or the place of a function."""

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        array = next(form for form in handler(core_schema)["anyOf"] if form.get("type") == "array")
        words = [{"type": "string", "pattern": r"\.py:"}, {"enum": list(REWARD_SETTINGS)}]
        return {"anyOf": [array | {"items": {"anyOf": [*array["items"]["anyOf"], *words]}}]}  # one entry needs no list


def _read(value: object) -> object:
    """One part as it stands, or a list of them; raises Problems."""
    match value:
        case [str(word)] if isinstance(value, tuple):  # which is how settings give one word to a field with a list
            return _read_part(word)
        case list() | tuple():
            return _read_parts(value)
    return _read_part(value)


def _read_parts(values: Sequence[object]) -> tuple[object, ...]:
    read, found = [], []
    for place, value in enumerate(values):
        try:
            read.append(_read_part(value))
        except Problems as error:
            found += [problem.under(place) for problem in error.found]
    if found or not values:
        raise Problems(found or [Problem((), "is an empty list; name at least one reward")])
    return tuple(read)


def _read_part(value: object) -> object:
    if isinstance(value, AnyReward):
        return value
    if isinstance(value, str) and ".py:" not in value:
        return by_type(value, REWARD_SETTINGS)
    fields = {"type": value} if isinstance(value, str) else value
    if not isinstance(fields, Mapping):
        raise Problems([Problem((), "expected a reward's type, a function in a file, settings, or a list of these")])
    kind = fields.get("type", "function" if "function" in fields else None)
    if isinstance(kind, str) and ".py:" in kind:
        fields = {"function": kind, **fields, "type": "function"}
    elif kind == "function":
        fields = {**fields, "type": kind}
    return by_type(fields, REWARD_SETTINGS)


def parts_of(reward: "_Any | tuple[_Any, ...]") -> tuple[_Any, ...]:
    """The parts of a reward, one or several."""
    return reward if isinstance(reward, tuple) else (reward,)


def _named_once(reward: "_Any | tuple[_Any, ...]") -> "_Any | tuple[_Any, ...]":
    names = Counter(part.called for part in parts_of(reward))
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ValueError(f'two parts are called "{twice[0]}"; give one of them another name')
    return reward


RewardSettings = Annotated[
    _Any | Annotated[tuple[_Any, ...], MinLen(1)], BeforeValidator(_read), AfterValidator(_named_once), _AsWritten()
]
"""The reward that a recipe asks for: one, or several that are added."""
