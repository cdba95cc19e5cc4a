"""From the turns of a row to a `Chat`.

ShareGPT turns (`from`, `value`) and OpenAI messages (`role`, `content`, `tool_calls`) are read alike; what one of them
cannot say is simply absent. The order of turns is judged mildly: two user turns in a row, or an answer that comes
first, are kept. Refused is what cannot be trained on: no answer, an empty one, a last turn that nothing answers.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from luthier.data.examples import Chat, Message, ToolCall
from luthier.data.strict_json import describe, parse_json
from luthier.errors import DataError

__all__ = ["ROLES", "chat", "conversation", "joined", "json_of", "list_of", "text_of", "text_or_turns", "turns_of"]

ROLES = {
    "assistant": "assistant",
    "developer": "system",
    "function": "tool",
    "function_call": "assistant",
    "gpt": "assistant",
    "human": "user",
    "observation": "tool",
    "system": "system",
    "tool": "tool",
    "user": "user",
}


def chat(turns: Sequence[Message], *, system: Any = None, tools: Any = None) -> Chat:
    """The conversation, which ends with an answer, with its system text in front and its tools as OpenAI writes them.

    Raises DataError where the turns cannot be trained on; all else as for `conversation`.
    """
    roles = [turn.role for turn in turns]
    if "assistant" not in roles:
        raise DataError("no turn is the assistant's, so there is nothing to learn")
    if roles[-1] != "assistant":
        raise DataError(f"the last turn is the {roles[-1]}'s and nothing answers it; drop that turn")
    return conversation(turns, system=system, tools=tools)


def conversation(turns: Sequence[Message], *, system: Any = None, tools: Any = None) -> Chat:
    """The turns, of which there is one or more, with their system text in front and their tools as OpenAI writes them.

    system: a system text that stands in a column of its own, or None. tools: a list of function descriptions, or JSON
    that spells one; bare descriptions are wrapped. Raises DataError for turns in an order that means nothing.
    """
    _check_order([turn.role for turn in turns])
    messages = tuple(turns)
    if system is not None and system != "":
        spoken = Message("system", text_of('"system"', system))
        if messages[0].role != "system":
            messages = (spoken, *messages)
        elif messages[0].content != spoken.content:
            raise DataError('"system" and the first turn are two different system messages; keep one')
    return Chat(messages, _tools(tools))


def turns_of(column: str, value: Any) -> list[Message]:
    """The turns that stand in a column, as a list or as JSON that spells one; DataError says which is wrong and why."""
    messages: list[Message] = []
    for number, turn in enumerate(list_of(f'"{column}"', value), start=1):
        where = f'turn {number} of "{column}"'
        if not isinstance(turn, dict):
            raise DataError(f"{where} is {describe(turn)}, not an object with a role and a text")
        message = _message(where, turn, messages)
        before = messages[-1] if messages else None
        if turn.get("from") == "function_call" and before and before.role == "assistant" and not before.tool_calls:
            messages[-1] = replace(before, tool_calls=message.tool_calls)  # words and calls are one answer
        else:
            messages.append(message)
    return messages


def text_or_turns(column: str, value: Any, *, role: str) -> list[Message]:
    """The turns that stand in a column as a list or as a single object, or a text as one turn of this role."""
    if isinstance(value, dict) and ("role" in value or "from" in value):
        value = [value]
    return turns_of(column, value) if isinstance(value, list) else [Message(role, text_of(f'"{column}"', value))]


def joined(first: str, second: str) -> str:
    """Both texts with an empty line between them, or the first alone where the second is blank."""
    return f"{first}\n\n{second}" if second.strip() else first


def text_of(where: str, value: Any, *, may_be_empty: bool = False) -> str:
    """`value` if it is text, and not blank unless that is allowed; otherwise DataError, which calls it `where`."""
    if not isinstance(value, str):
        raise DataError(f"{where} is {describe(value)}, not text")
    if not value.strip() and not may_be_empty:
        raise DataError(f"{where} is empty")
    _check_contents(where, value)
    return value


def json_of(where: str, value: Any) -> Any:
    """What a JSON string spells, or any other value as it is, after a check that it can be written as JSON again."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except DataError as error:
            raise DataError(f"{where} {error}") from None
    _check_contents(where, value)
    return value


def list_of(where: str, value: Any) -> list[Any]:
    """A list, or what a JSON string spells if that is one."""
    items = json_of(where, value)
    if not isinstance(items, list):
        raise DataError(f"{where} is {describe(items)}, not a list")
    return items


def _check_order(roles: Sequence[str]) -> None:
    if "system" in roles[1:]:
        raise DataError(f"turn {roles.index('system', 1) + 1} is a system message; only the first turn may be one")
    if "tool" in roles and "assistant" not in roles[: roles.index("tool")]:
        raise DataError("a tool answers before the assistant has called one")


def _message(where: str, turn: dict[str, Any], before: Sequence[Message]) -> Message:
    role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
    word = text_of(f'"{role_key}" of {where}', turn.get(role_key))
    if word not in ROLES:
        raise DataError(f'"{role_key}" of {where} is {describe(word)}; known are {", ".join(ROLES)}')
    role = ROLES[word]
    content = turn.get(text_key)
    if word == "function_call":
        return Message(role, "", _tool_calls(f'"{text_key}" of {where}', content), trained=_trained(where, turn))
    asked = turn.get("tool_calls") or turn.get("function_call")
    calls = _tool_calls(f'"tool_calls" of {where}', asked) if asked else ()
    if calls and role != "assistant":
        raise DataError(f"{where} is the {role}'s and cannot call tools")
    if content is None and calls:
        content = ""
    text = _content(f'"{text_key}" of {where}', content, may_be_empty=role in ("system", "tool") or bool(calls))
    answered = _answered(where, turn) if role == "tool" else None
    return Message(role, text, calls, _name(where, turn, answered, before), _trained(where, turn), answered)


def _content(where: str, value: Any, *, may_be_empty: bool) -> str:
    if not isinstance(value, list):
        return text_of(where, value, may_be_empty=may_be_empty)
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise DataError(f"a part of {where} is of type {describe(kind)}; only text can be read")
    texts = [text_of(f"a part of {where}", part.get("text"), may_be_empty=True) for part in value]
    return text_of(where, "".join(texts), may_be_empty=may_be_empty)


def _answered(where: str, turn: dict[str, Any]) -> str | None:
    value = turn.get("tool_call_id")
    return None if value is None else text_of(f'"tool_call_id" of {where}', value)


def _name(where: str, turn: dict[str, Any], answered: str | None, before: Sequence[Message]) -> str | None:
    """The turn's own name; for a tool's answer else the name of the function whose call it answers."""
    if turn.get("name") is not None:
        return text_of(f'"name" of {where}', turn["name"])
    if answered is None:
        return None
    names = {call.id: call.name for message in before for call in message.tool_calls}
    if answered not in names:
        raise DataError(f'"tool_call_id" of {where} is {describe(answered)}, which no call before it has')
    return names[answered]


def _trained(where: str, turn: dict[str, Any]) -> bool | None:
    for key in ("weight", "train"):
        value = turn.get(key)
        if value is not None:
            if not isinstance(value, int | float) or value not in (0, 1):
                raise DataError(f'"{key}" of {where} is {describe(value)}; it must be 0 or 1')
            return bool(value)
    return None


def _tool_calls(where: str, value: Any) -> tuple[ToolCall, ...]:
    calls = json_of(where, value)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls:
        raise DataError(f"{where} is an empty list, so nothing is called")
    return tuple(_tool_call(where, call) for call in calls)


def _tool_call(where: str, call: Any) -> ToolCall:
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict):
        raise DataError(f'{where} holds {describe(function)}, not a call with "name" and "arguments"')
    if "arguments" not in function:
        raise DataError(f'{where} holds a call without "arguments"; write {{}} for none')
    name = text_of(f'"name" in {where}', function.get("name"))
    arguments = json_of(f'"arguments" in {where}', function["arguments"])
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise DataError(f'"arguments" in {where} is {describe(arguments)}, not an object')
    identity = call.get("id")
    return ToolCall(name, arguments, None if identity is None else text_of(f'"id" in {where}', identity))


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    if value is None or value == "":
        return ()
    tools = list_of('"tools"', value)
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict):
            raise DataError(f'"tools" holds {describe(tool)}, not a function description')
        text_of('"name" of a tool', function.get("name"))
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def _check_contents(where: str, value: Any) -> None:
    """Refuses what a tokenizer or a JSON file cannot take, at any depth (which the reader has bounded)."""
    match value:
        case str():
            _check_characters(where, value)
        case list():
            for item in value:
                _check_contents(where, item)
        case dict():
            for key, item in value.items():
                _check_contents(where, key)
                _check_contents(where, item)
        case float() if value - value != 0:
            raise DataError(f"{where} holds {value}, which JSON cannot write")
        case None | bool() | int() | float():
            pass
        case _:
            raise DataError(f"{where} holds {describe(value)}, which JSON cannot write")


def _check_characters(where: str, text: str) -> None:
    if "\0" in text:
        raise DataError(f"{where} holds a NUL character at position {text.index(chr(0)) + 1}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} holds half of a surrogate pair at position {error.start + 1}") from None
