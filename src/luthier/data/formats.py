"""What the columns of a row mean: one function and one line of `FORMATS` for each format that is known.

A format names the columns that it needs and may use; its function sees those alone, under their first names, and makes
an example of them or raises DataError with the reason. Columns beyond those (ids, sources, scores) are left alone. A
row of another task, such as a preference pair, is refused by its columns: half of it would train as if it were good.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from luthier.data.conversations import chat, text_of, turns_of
from luthier.data.examples import Example, Message, Text
from luthier.data.strict_json import describe
from luthier.errors import DataError

__all__ = ["FORMATS", "Format", "check_names", "map_columns", "recognise", "to_example"]


@dataclass(frozen=True, slots=True)
class Format:
    """How rows of one shape become examples.

    needs, may: the columns that must and that may be there. "completion|response" means either name; `make` sees the
    first. A column that is null counts as absent.
    """

    make: Callable[[Mapping[str, Any]], Example]
    needs: tuple[str, ...]
    may: tuple[str, ...] = ()

    def fits(self, values: Mapping[str, Any]) -> bool:
        """Whether every column is there that the format needs."""
        return all(_present(values, names) is not None for names in self.needs)

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
    asked = _joined(text_of('"instruction"', row["instruction"]), _optional_text(row, "input"))
    turns = [*_history(row.get("history")), *_exchange(asked, text_of('"output"', row["output"]))]
    return chat(turns, system=row.get("system"))


def prompt_completion(row: Mapping[str, Any]) -> Example:
    """A prompt and its completion, each a text or a list of messages."""
    turns = [
        *_text_or_turns("prompt", row["prompt"], role="user"),
        *_text_or_turns("completion", row["completion"], role="assistant"),
    ]
    return chat(turns, system=row.get("system"), tools=row.get("tools"))


def question_answer(row: Mapping[str, Any]) -> Example:
    """A question and its answer, after a `context` if there is one; of several answers the first is learned."""
    context, question = _optional_text(row, "context"), text_of('"question"', row["question"])
    asked = _joined(context, question) if context else question
    return chat(_exchange(asked, text_of('"answer"', _first_answer(row["answer"]))), system=row.get("system"))


def text(row: Mapping[str, Any]) -> Example:
    """Plain text, learned as it stands."""
    return Text(text_of('"text"', row["text"]))


# The first that fits is taken, so a row with turns and a rendered `text` beside them is read by its turns.
FORMATS: dict[str, Format] = {
    "messages": Format(messages, needs=("messages",), may=("system", "tools")),
    "sharegpt": Format(sharegpt, needs=("conversations|conversation",), may=("system", "tools")),
    "alpaca": Format(alpaca, needs=("instruction", "output|response"), may=("input|context", "history", "system")),
    "prompt_completion": Format(prompt_completion, needs=("prompt", "completion|response"), may=("system", "tools")),
    "question_answer": Format(question_answer, needs=("question", "answer|answers"), may=("context", "system")),
    "text": Format(text, needs=("text|content",)),
}

_OTHER_TASKS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("chosen", "rejected"), "a preference pair"),
    (("messages", "label"), "an answer with a verdict, good or bad"),
    (("completion", "label"), "an answer with a verdict, good or bad"),
    (("kto_tag",), "an answer with a verdict, good or bad"),
    (("image",), "a picture with text"),
    (("images",), "pictures with text"),
)


def recognise(values: Mapping[str, Any]) -> str:
    """The name of the first format whose columns are there; DataError lists what was seen and what is known."""
    for names, what in _OTHER_TASKS:
        if all(values.get(name) is not None for name in names):
            seen = _quoted(names)
            raise DataError(f"a row with {seen} is {what}, not an example to imitate; name a format to read it as one")
    for name, known in FORMATS.items():
        if known.fits(values):
            return name
    known_formats = "; ".join(f"{name} ({known})" for name, known in FORMATS.items())
    raise DataError(
        f"the columns {_quoted(values)} fit no known format: {known_formats}; "
        'say which column is which, such as columns: {"question": "Frage", "answer": "Antwort"}'
    )


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
    return known.make(row)


def map_columns(values: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with each `actual` column of {canonical: actual} under its canonical name; DataError if it has none."""
    missing = [actual for actual in columns.values() if actual not in values]
    if missing:
        raise DataError(f'has no column "{missing[0]}", which `columns` names; the columns are {_quoted(values)}')
    kept = {name: value for name, value in values.items() if name not in columns.values()}
    return kept | {canonical: values[actual] for canonical, actual in columns.items()}


def check_names(name: str | None, columns: Mapping[str, str]) -> None:
    """Raises DataError, with the nearest valid name, where a format or a canonical column is not known."""
    if name is not None and name not in FORMATS:
        raise DataError(f'format "{name}" is not known; {_choices(name, FORMATS)}')
    formats = FORMATS.values() if name is None else [FORMATS[name]]
    valid = dict.fromkeys(column for known in formats for column in known.names())
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


def _joined(first: str, second: str) -> str:
    return f"{first}\n\n{second}" if second.strip() else first


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


def _text_or_turns(column: str, value: Any, *, role: str) -> list[Message]:
    return turns_of(column, value) if isinstance(value, list) else [Message(role, text_of(f'"{column}"', value))]


def _first_answer(value: Any) -> Any:
    """The answer itself, or the first of a list of texts, of {"text": ...} objects, or of {"text": [...]}."""
    if isinstance(value, dict) and "text" in value:
        value = value["text"]
    if isinstance(value, list) and value:
        value = value[0]["text"] if isinstance(value[0], dict) and "text" in value[0] else value[0]
    return value
