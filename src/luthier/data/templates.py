"""A conversation becomes text by the model's own chat template, the same way in training, chat and the server.

A template that does not know tools, or a system turn, gets the conversation in a plain form, which every template can
show: tool descriptions as JSON lines in the system turn, calls as `<tool_call>` blocks in the assistant's words,
results as a user's turn of `<tool_response>` blocks, and a system turn at the head of the first user's turn. Which form
a template gets is found out once (`dialects.py`). `{% generation %}` marks are not used: several stock templates lack
them or set them wrongly.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.data.dialects import Dialect, Turn, apply_template, dialect_of
from luthier.data.examples import Chat, Message, ToolCall
from luthier.data.markers import CUT
from luthier.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Conversation", "conversation_of", "encode_whole", "render", "stop_token_ids"]

_ROLES = ("system", "user", "assistant", "tool")
_CALL_ID_LENGTH = 9  # the only length that Mistral's template accepts
_TOOLS_HEAD = "These functions can be called. Each line describes one in JSON:"
_TOOLS_TAIL = (
    'A call is written as\n<tool_call>\n{"name": "function", "arguments": {"argument": "value"}}\n</tool_call>'
)


@dataclass(frozen=True, slots=True, eq=False)
class Conversation:
    """A chat in the form that one template understands, with every marker that a message spells cut in two."""

    dialect: Dialect
    turns: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...]

    def render(self, turns: Sequence[Turn], *, generation: bool = False) -> str:
        """These turns as text with cuts; `generation` ends it with the header of the assistant's next turn."""
        return apply_template(self.dialect.tokenizer, turns, self.tools, generation=generation)


def render(chat: Chat, tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool = False) -> str:
    """The conversation as text, for reading. Token ids come from the functions that encode, never from this.

    Raises TemplateError if the template refuses the conversation.
    """
    conversation = conversation_of(chat, tokenizer)
    return conversation.render(conversation.turns, generation=add_generation_prompt).replace(CUT, "")


def encode_whole(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids of the conversation as the template writes it, with what it sets behind the last turn: what a
    reward model reads. Raises TemplateError if the template refuses the conversation.
    """
    conversation = conversation_of(chat, tokenizer)
    return conversation.dialect.encoder.encode(conversation.render(conversation.turns))


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an assistant's turn, as the template writes them; empty if it writes none."""
    return set(dialect_of(tokenizer).stop_ids)


def conversation_of(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> Conversation:
    """The chat as the tokenizer's template can show it. Raises DataError for a role that does not exist."""
    dialect = dialect_of(tokenizer)
    if unknown := [message.role for message in chat.messages if message.role not in _ROLES]:
        raise DataError(f"a message has the role {unknown[0]!r}; roles are {', '.join(_ROLES)}")
    if not chat.messages:
        raise DataError("the conversation has no messages; drop the row")
    tools = tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in chat.tools)
    turns = _native(chat.messages) if dialect.knows_tools else _plain(chat.messages, tools)
    if not dialect.knows_system:
        turns = _system_joined(turns)
    guard = dialect.encoder.guard
    return Conversation(dialect, tuple(guard(turns)), tuple(guard(tools)) if dialect.knows_tools else ())


def _native(messages: Iterable[Message]) -> list[Turn]:
    turns: list[Turn] = []
    waiting: list[tuple[str | None, str]] = []  # of the calls not answered yet: their own ids, and those shown
    num_calls = 0
    for message in messages:
        turn: Turn = {"role": message.role, "content": message.content}
        if message.name is not None:
            turn["name"] = message.name
        if message.tool_calls:
            turn["tool_calls"] = [_call(call, num_calls + i) for i, call in enumerate(message.tool_calls)]
            num_calls += len(message.tool_calls)
            shown = [call["id"] for call in turn["tool_calls"]]
            waiting = list(zip([call.id for call in message.tool_calls], shown, strict=True))
        if message.role == "tool" and waiting:
            turn["tool_call_id"] = waiting.pop(_answered(message, waiting))[1]
        turns.append(turn)
    return turns


def _answered(result: Message, waiting: Sequence[tuple[str | None, str]]) -> int:
    """Which of the calls a result answers: the one that it names, else the first."""
    named = [place for place, (own, _) in enumerate(waiting) if own is not None and own == result.tool_call_id]
    return named[0] if named else 0


def _call(call: ToolCall, index: int) -> dict[str, Any]:
    usable = call.id is not None and len(call.id) == _CALL_ID_LENGTH and call.id.isalnum()
    return {
        "id": call.id if usable else f"call{index:0{_CALL_ID_LENGTH - 4}d}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _plain(messages: Iterable[Message], tools: Sequence[dict[str, Any]]) -> list[Turn]:
    turns: list[Turn] = []
    after_result = False
    for message in messages:
        if message.role == "tool":
            result = f"<tool_response>\n{message.content}\n</tool_response>"
            if after_result:
                turns[-1]["content"] += f"\n{result}"
            else:
                turns.append({"role": "user", "content": result})
        else:
            turns.append({"role": message.role, "content": _plain_words(message)})
        after_result = message.role == "tool"
    return _tools_described(turns, tools) if tools else turns


def _plain_words(message: Message) -> str:
    calls = [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]
    blocks = [f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in calls]
    return "\n".join([message.content, *blocks] if message.content else blocks)


def _tools_described(turns: list[Turn], tools: Iterable[dict[str, Any]]) -> list[Turn]:
    lines = [json.dumps(tool, ensure_ascii=False) for tool in tools]
    described = "\n".join([_TOOLS_HEAD, "<tools>", *lines, "</tools>", _TOOLS_TAIL])
    if turns[0]["role"] != "system":
        return [{"role": "system", "content": described}, *turns]
    return [{"role": "system", "content": f"{turns[0]['content']}\n\n{described}"}, *turns[1:]]


def _system_joined(turns: list[Turn]) -> list[Turn]:
    if turns[0]["role"] != "system":
        return turns
    system, rest = turns[0]["content"], turns[1:]
    if rest and rest[0]["role"] == "user":
        return [rest[0] | {"content": f"{system}\n\n{rest[0]['content']}"}, *rest[1:]]
    return [{"role": "user", "content": system}, *rest]
