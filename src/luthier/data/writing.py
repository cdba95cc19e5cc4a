"""From examples and bad rows back to files, each with one JSON object a line.

Turns are written as OpenAI messages, so that reading the file gives the same examples. Files are written beside
their place and renamed, so a half-written one never stands under the name that was asked for.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from luthier.data.examples import Chat, Example, Feedback, Message, Preference, Prompt, Steps, Text, ToolCall
from luthier.data.sources import BadRow
from luthier.errors import DataError
from luthier.files import replacing

__all__ = ["write_examples", "write_quarantine"]


def write_examples(examples: Iterable[Example], path: Path) -> int:
    """Writes the examples, all of one kind, as JSONL and returns how many; reading the file gives equal examples.

    A conversation is written as messages, with a turn's own `trained` as `weight` 0 or 1; feedback has a label beside
    them; a preference is written as a prompt with chosen and rejected, a longer ranking as a prompt with responses, a
    prompt alone without its row's further columns.
    Raises DataError for plain text, which has no turns, and for examples of several kinds.
    """
    return _write_lines(_example_rows(examples), path)


def write_quarantine(bad: Iterable[BadRow], path: Path) -> int:
    """Writes file, line, reason and raw text of each bad row and returns how many; without any the file is empty."""
    rows = ({"file": row.origin.file, "line": row.origin.line, "reason": row.reason, "raw": row.raw} for row in bad)
    return _write_lines(rows, path)


def _write_lines(rows: Iterable[dict[str, Any]], path: Path) -> int:
    num_rows = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # backslashreplace: half of a surrogate pair becomes \udxxx, which is its own escape in a JSON string
        with (
            replacing(path) as beside,
            open(beside, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as stream,
        ):
            for row in rows:
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                num_rows += 1
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
    return num_rows


def _example_rows(examples: Iterable[Example]) -> Iterator[dict[str, Any]]:
    first: type[Example] | None = None
    for example in examples:
        first = first or type(example)
        if not isinstance(example, first):
            raise DataError("the files hold examples of several kinds, which are no one file; convert them one by one")
        yield _example_row(example)


def _example_row(example: Example) -> dict[str, Any]:
    if isinstance(example, Feedback):
        return _example_row(example.chat) | {"label": example.desirable}
    if isinstance(example, Text):
        raise DataError("plain text cannot be written as messages; keep it as .txt or as rows with a text column")
    row: dict[str, Any]
    match example:
        case Chat():
            row = {"messages": _turns(example.messages)}
        case Prompt():
            row = {"prompt": _turns(example.messages)}
        case Preference():
            row = _preference_row(example)
        case Steps():
            row = {"prompt": _turns(example.prompt), "completions": list(example.steps)}
            row["labels"] = list(example.correct)
    return row | {"tools": list(example.tools)} if example.tools else row


def _preference_row(example: Preference) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt": _turns(example.prompt)}
    answers = [_turns(answer) for answer in example.answers]
    if len(answers) > 2:
        row["responses"] = answers
        return row if example.scores is None else row | {"scores": list(example.scores)}
    row |= dict(zip(("chosen", "rejected"), answers, strict=True))
    return row | dict(zip(("chosen_score", "rejected_score"), example.scores or (), strict=False))


def _turns(messages: Iterable[Message]) -> list[dict[str, Any]]:
    return [_turn(message) for message in messages]


def _turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [_call(call) for call in message.tool_calls]
    if message.name is not None:
        turn["name"] = message.name
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.trained is not None:
        turn["weight"] = int(message.trained)
    return turn


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return ({} if call.id is None else {"id": call.id}) | {"type": "function", "function": function}
