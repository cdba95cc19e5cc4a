"""What the columns of a row mean: one function and one line of `FORMATS` for each format that is known.

A format names the columns that it needs and may use; its function sees those alone, under their first names, and makes
an example of them or raises DataError with the reason. Columns beyond those (ids, sources, scores) are left alone. A
format belongs to a task, and a row of another task is refused by its columns: half of a preference pair would train as
if it were good.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from luthier.data.conversations import chat, joined, text_of, text_or_turns, turns_of
from luthier.data.examples import Example, Message, Prompt, Text
from luthier.data.preference_formats import (
    dialogues,
    feedback,
    feedback_messages,
    preference,
    prompt,
    prompt_messages,
    ranking,
    sharegpt_feedback,
    sharegpt_preference,
    sharegpt_prompt,
    steps,
)
from luthier.data.strict_json import describe
from luthier.errors import DataError

__all__ = ["FORMATS", "Format", "Task", "check_names", "map_columns", "recognise", "to_example"]

Task = Literal["imitate", "prefer", "judge", "grade", "ask"]
"""What a row is for: to write its answer, to know the better of its answers, to know whether its one answer is
desirable, or which of its steps are right, or to be answered.
"""

# The task that asks most of a row comes first, so a row that fits several is for that one.
_MEANINGS: dict[Task, str] = {
    "grade": "an answer in steps with a label for each; train on it with process_reward",
    "prefer": "a preference pair or ranking; train on it with dpo, ipo, orpo, simpo, cpo or reward",
    "judge": "an answer with a verdict, good or bad; train on it with kto",
    "imitate": "an example to imitate; train on it with sft or pretrain",
    "ask": "a prompt to be answered; learn from it with iterative_dpo or rlaif",
}


@dataclass(frozen=True, slots=True)
class Format:
    """How rows of one shape become examples.

    needs, may: the columns that must and that may be there. "completion|response" means either name; `make` sees the
    first. A column that is null counts as absent. task: what its examples are for.
    """

    make: Callable[[Mapping[str, Any]], Example]
    needs: tuple[str, ...]
    may: tuple[str, ...] = ()
    task: Task = "imitate"

    def fits(self, values: Mapping[str, Any]) -> bool:
        """Whether every column is there that the format needs."""
        return all(_present(values, names) is not None for names in self.needs)

    def seen(self, values: Mapping[str, Any]) -> list[str]:
        """The row's own names of the columns that the format needs."""
        return [name for names in self.needs for name in names.split("|") if values.get(name) is not None]

    def names(self) -> list[str]:
        """Every column name that the format knows."""
        return [name for names in (*self.needs, *self.may) for name in names.split("|")]

    def __str__(self) -> str:
        return ", ".join(names.replace("|", " or ") for names in self.needs)


def messages(row: Mapping[str, Any]) -> Example:
    """OpenAI messages: a list of turns with `role` and `content`."""
    return chat(turns_of("messages", row["messages"]), system=row.get("system"), tools=row.get("tools"))


def sharegpt(row: Mapping[str, Any]) -> Example:
    """ShareGPT conversations: a list of turns with `from` and `value`; calls and results of tools are turns too."""
    return chat(turns_of("conversations", row["conversations"]), system=row.get("system"), tools=row.get("tools"))


def alpaca(row: Mapping[str, Any]) -> Example:
    """Alpaca: the user says `instruction`, an empty line and `input`; `history` holds [user, assistant] pairs."""
    asked = joined(text_of('"instruction"', row["instruction"]), _optional_text(row, "input"))
    turns = [*_history(row.get("history")), *_exchange(asked, text_of('"output"', row["output"]))]
    return chat(turns, system=row.get("system"))


def prompt_completion(row: Mapping[str, Any]) -> Example:
    """A prompt and its completion, each a text or a list of messages."""
    turns = [
        *text_or_turns("prompt", row["prompt"], role="user"),
        *text_or_turns("completion", row["completion"], role="assistant"),
    ]
    return chat(turns, system=row.get("system"), tools=row.get("tools"))


def question_answer(row: Mapping[str, Any]) -> Example:
    """A question and its answer, after a `context` if there is one; of several answers the first is learned."""
    context, question = _optional_text(row, "context"), text_of('"question"', row["question"])
    asked = joined(context, question) if context else question
    return chat(_exchange(asked, text_of('"answer"', _first_answer(row["answer"]))), system=row.get("system"))


def text(row: Mapping[str, Any]) -> Example:
    """Plain text, learned as it stands."""
    return Text(text_of('"text"', row["text"]))


_CHAT = ("system", "tools")
_SCORED = ("chosen_score|score_chosen", "rejected_score|score_rejected", "margin")
_VERDICT = "label|kto_tag"

# The first that fits is taken, so a row with turns and a rendered `text` beside them is read by its turns.
FORMATS: dict[str, Format] = {
    "messages": Format(messages, needs=("messages",), may=_CHAT),
    "sharegpt": Format(sharegpt, needs=("conversations|conversation",), may=_CHAT),
    "alpaca": Format(alpaca, needs=("instruction", "output|response"), may=("input|context", "history", "system")),
    "prompt_completion": Format(prompt_completion, needs=("prompt", "completion|response"), may=_CHAT),
    "question_answer": Format(question_answer, needs=("question", "answer|answers"), may=("context", "system")),
    "text": Format(text, needs=("text|content",)),
    "preference": Format(
        preference,
        needs=("prompt|instruction|question", "chosen", "rejected"),
        may=("input", *_CHAT, *_SCORED),
        task="prefer",
    ),
    "sharegpt_preference": Format(
        sharegpt_preference,
        needs=("conversations|conversation", "chosen", "rejected"),
        may=(*_CHAT, *_SCORED),
        task="prefer",
    ),
    "dialogues": Format(dialogues, needs=("chosen", "rejected"), may=(*_CHAT, *_SCORED), task="prefer"),
    "ranking": Format(
        ranking,
        needs=("prompt|instruction", "responses|answers|completions"),
        may=("input", *_CHAT, "scores", "ranks"),
        task="prefer",
    ),
    "feedback": Format(
        feedback,
        needs=("prompt|instruction", "completion|response|output", _VERDICT),
        may=("input", *_CHAT),
        task="judge",
    ),
    "feedback_messages": Format(feedback_messages, needs=("messages", _VERDICT), may=_CHAT, task="judge"),
    "sharegpt_feedback": Format(
        sharegpt_feedback, needs=("conversations|conversation", _VERDICT), may=_CHAT, task="judge"
    ),
    "steps": Format(
        steps,
        needs=("prompt|instruction|question", "completions|steps", "labels"),
        may=("input", *_CHAT),
        task="grade",
    ),
    "prompt": Format(prompt, needs=("prompt|instruction|question",), may=("input", *_CHAT), task="ask"),
    "prompt_messages": Format(prompt_messages, needs=("messages",), may=_CHAT, task="ask"),
    "sharegpt_prompt": Format(sharegpt_prompt, needs=("conversations|conversation",), may=_CHAT, task="ask"),
}

_PICTURES = {"image": "a picture with text", "images": "pictures with text"}


def recognise(values: Mapping[str, Any], task: Task | None = "imitate") -> str:
    """The name of the task's first format whose columns are there; DataError says what the row is instead.

    A row that also prefers or judges is no example to imitate, and what has only a prompt lacks something for all tasks
    but to be answered. task: None takes whatever the row is for.
    """
    for name, what in _PICTURES.items():
        if values.get(name) is not None:
            raise DataError(f'a row with "{name}" is {what}, which no stage reads; name a format to read its text')
    fitting: dict[Task, str] = {}
    for name, known in FORMATS.items():
        if known.fits(values) and (known.task != "ask" or task in ("ask", None)):
            fitting.setdefault(known.task, name)
    found = next((most for most in _MEANINGS if most in fitting), None)
    if found is None:
        raise DataError(_unknown(values, task))
    if task in (None, found):
        return fitting[found]
    if task in fitting and task != "imitate":
        return fitting[task]
    seen = _quoted(FORMATS[fitting[found]].seen(values))
    raise DataError(f"a row with {seen} is {_MEANINGS[found]}, or name a format to read it otherwise")


def _unknown(values: Mapping[str, Any], task: Task | None) -> str:
    known_formats = "; ".join(f"{name} ({known})" for name, known in _formats_of(task).items())
    return (
        f"the columns {_quoted(values)} fit no known format: {known_formats}; "
        'say which column is which, such as columns: {"question": "Frage", "answer": "Antwort"}'
    )


def _formats_of(task: Task | None) -> dict[str, Format]:
    return {name: known for name, known in FORMATS.items() if task in (None, known.task)}


def to_example(values: Mapping[str, Any], name: str) -> Example:
    """The example that a row of the named format holds; DataError names the field at fault and what was found."""
    known = FORMATS[name]
    row: dict[str, Any] = {}
    for names in (*known.needs, *known.may):
        value = _present(values, names)
        if value is not None:
            row[names.split("|")[0]] = value
        elif names in known.needs:
            either = names.replace("|", '" or "')
            raise DataError(f'has no "{either}" (format {name} needs {known}; the columns are {_quoted(values)})')
    example = known.make(row)
    return replace(example, row=dict(values)) if isinstance(example, Prompt) else example


def map_columns(values: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with each `actual` column of {canonical: actual} under its canonical name; DataError if it has none."""
    missing = [actual for actual in columns.values() if actual not in values]
    if missing:
        raise DataError(f'has no column "{missing[0]}", which `columns` names; the columns are {_quoted(values)}')
    kept = {name: value for name, value in values.items() if name not in columns.values()}
    return kept | {canonical: values[actual] for canonical, actual in columns.items()}


def check_names(name: str | None, columns: Mapping[str, str], task: Task | None = "imitate") -> None:
    """Raises DataError, with the nearest valid name, where a format or a canonical column is not known to the task."""
    formats = _formats_of(task)
    if name is not None and name not in formats:
        if name in FORMATS:
            raise DataError(f'format "{name}" is of another task: a row of it is {_MEANINGS[FORMATS[name].task]}')
        raise DataError(f'format "{name}" is not known; {_choices(name, formats)}')
    used = formats.values() if name is None else [FORMATS[name]]
    valid = dict.fromkeys(column for known in used for column in known.names())
    for canonical in columns:
        if canonical not in valid:
            raise DataError(f'`columns` maps "{canonical}", which is no column; {_choices(canonical, valid)}')


def _choices(wrong: str, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(wrong, valid, n=1)
    return f'is "{near[0]}" meant?' if near else f"known are {', '.join(valid)}"


def _present(values: Mapping[str, Any], names: str) -> Any:
    return next((values[name] for name in names.split("|") if values.get(name) is not None), None)


def _quoted(names: Iterable[str]) -> str:
    shown = [f'"{name[:40]}"' for name in names]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")


def _optional_text(row: Mapping[str, Any], name: str) -> str:
    return text_of(f'"{name}"', row[name], may_be_empty=True) if name in row else ""


def _exchange(asked: str, answered: str) -> list[Message]:
    return [Message("user", asked), Message("assistant", answered)]


def _history(value: Any) -> list[Message]:
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        raise DataError(f'"history" is {describe(value)}, not a list of [user, assistant] pairs')
    turns: list[Message] = []
    for number, pair in enumerate(value, start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f'entry {number} of "history" is {describe(pair)}, not a [user, assistant] pair')
        where = f'entry {number} of "history"'
        turns += _exchange(text_of(where, pair[0]), text_of(where, pair[1]))
    return turns


def _first_answer(value: Any) -> Any:
    """The answer itself, or the first of a list of texts, of {"text": ...} objects, or of {"text": [...]}."""
    if isinstance(value, dict) and "text" in value:
        value = value["text"]
    if isinstance(value, list) and value:
        value = value[0]["text"] if isinstance(value[0], dict) and "text" in value[0] else value[0]
    return value
