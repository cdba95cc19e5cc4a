"""The few canonical shapes that a row of any known format becomes.

Formats (`data/formats.py`) make these, templates (`data/templates.py`) turn them into tokens. Nothing here knows of
files, tokenizers or tensors. Each example travels with its `Origin`, so that every later complaint names file and line.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Chat", "Example", "Feedback", "Message", "Origin", "Preference", "Prompt", "Steps", "Text", "ToolCall"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an example was read: a file and its line (for Parquet and JSON arrays: its row), counted from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the assistant asks for, with its arguments as the model should write them."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is system, user, assistant or tool; `trained` overrides `train_on` for this turn alone.

    tool_call_id: of a tool's turn, the `id` of the call that it answers; without one it answers the next in order.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    trained: bool | None = None
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, trained on as it stands."""

    text: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation; `tools` are JSON-schema function descriptions as OpenAI writes them."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Preference:
    """Two or more answers to one conversation, the best first; each is one turn of the assistant, or several with tools
    between.

    prompt: ends with a turn that is not the assistant's. scores: one for each answer where the row has them, such as a
    judge's; a pair's margin is the difference of two.
    """

    prompt: tuple[Message, ...]
    answers: tuple[tuple[Message, ...], ...]
    tools: tuple[dict[str, Any], ...] = field(default=())
    scores: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Feedback:
    """One answer, the last turn of a conversation, and whether it is desirable."""

    chat: Chat
    desirable: bool


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that waits for an answer. row: all columns that it stood in, for functions that judge answers."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = field(default=())
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Steps:
    """An answer in steps, and of each step whether it is right."""

    prompt: tuple[Message, ...]
    steps: tuple[str, ...]
    correct: tuple[bool, ...]
    tools: tuple[dict[str, Any], ...] = field(default=())


Example = Text | Chat | Preference | Feedback | Prompt | Steps
