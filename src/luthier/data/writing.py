"""From examples and bad rows back to files, each with one JSON object a line.

Conversations are written as OpenAI messages, so that reading the file gives the same examples. Files are written beside
their place and renamed, so a half-written one never stands under the name that was asked for.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from luthier.data.examples import Chat, Example, Message, ToolCall
from luthier.data.sources import BadRow
from luthier.errors import DataError
from luthier.files import replacing

__all__ = ["write_messages", "write_quarantine"]


def write_messages(examples: Iterable[Example], path: Path) -> int:
    """Writes OpenAI messages JSONL and returns how many rows; reading it gives equal examples.

    A turn's own `trained` is written as `weight` 0 or 1. Raises DataError for plain text, which has no turns.
    """
    return _write_lines(map(_chat_row, examples), path)


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


def _chat_row(example: Example) -> dict[str, Any]:
    if not isinstance(example, Chat):
        raise DataError("plain text cannot be written as messages; keep it as .txt or as rows with a text column")
    row: dict[str, Any] = {"messages": [_turn(message) for message in example.messages]}
    return row | {"tools": list(example.tools)} if example.tools else row


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
