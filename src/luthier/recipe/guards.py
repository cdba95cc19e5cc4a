"""Guards that a recipe sets beside a training: what it may cost the model, and what is looked at while it runs.

A bare value stands for the setting that matters most: `forgetting: general.txt` is `forgetting: {text: general.txt}`.
"""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Self

from annotated_types import Ge, Gt, Lt
from pydantic import model_validator

from luthier.recipe.problems import Problem, Problems
from luthier.recipe.settings import Count, Names, Settings, Word

__all__ = ["Forgetting", "Watch"]

_Positive = Annotated[float, Gt(0)]
_Fall = Annotated[float, Gt(0), Lt(1)]
_OF_TEXT, _OF_QUESTIONS = ("tokens", "warn", "stop"), ("num_questions", "accuracy_warn", "accuracy_stop")


class Forgetting(Settings):
    """What a training may take away from the model, by general text, general questions or both."""

    short_form: ClassVar[str] = "text"

    text: Word | Names | None = None
    """Files of general text on which the perplexity is measured at each evaluation."""

    tokens: Annotated[int, Ge(2)] = 8192
    """How many tokens of the text are measured on, its first ones."""

    warn: _Positive = 0.05
    """The share by which that perplexity may rise over the untrained model's before a warning."""

    stop: _Positive = 0.15
    """The share by which it may rise before the training ends and goes back to the best checkpoint."""

    questions: Word | Names | None = None
    """Files of questions with choices and the right one (columns question, choices, answer), as MMLU's, on which the
    accuracy is measured at each evaluation."""

    num_questions: Count = 256
    """How many of the questions are measured on, evenly spread over the files."""

    accuracy_warn: _Fall = 0.02
    """By how much that accuracy may fall below the untrained model's before a warning; 0.02 are two points of 100."""

    accuracy_stop: _Fall = 0.05
    """By how much it may fall before the training ends; a fall within two standard errors never counts."""

    @model_validator(mode="after")
    def _measures(self) -> Self:
        if found := [*_order_problems(self), *_idle_problems(self)]:
            raise Problems(found)
        return self


class Watch(Settings):
    """Prompts that the model answers at each evaluation, for people to read and signs to be looked for."""

    short_form: ClassVar[str] = "prompts"

    prompts: Names
    """What the model is asked; in pretraining, text that it goes on from."""

    max_new_tokens: Count = 64
    """The longest answer, in tokens."""


def _order_problems(settings: Forgetting) -> Iterator[Problem]:
    for warn, stop in (("warn", "stop"), ("accuracy_warn", "accuracy_stop")):
        if getattr(settings, warn) > getattr(settings, stop):
            yield Problem((warn,), f"lies over {stop}, where the training ends; lower it")


def _idle_problems(settings: Forgetting) -> Iterator[Problem]:
    if settings.text is None and settings.questions is None:
        yield Problem(("text",), "there is nothing to measure forgetting on; name general text, or questions")
        return
    for needed, names in (("text", _OF_TEXT), ("questions", _OF_QUESTIONS)):
        for name in names:
            usual = type(settings).model_fields[name].default
            if getattr(settings, needed) is None and getattr(settings, name) != usual:
                yield Problem((name,), f"has no effect without {needed}; name some, or drop it")
