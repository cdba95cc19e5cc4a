"""AWKWARD: a dozen conversations that have broken chat templates, for checking one without any data.

Each is named by its line, as a row of a file would be.
"""

from luthier.data.examples import Chat, Message, Origin, ToolCall

__all__ = ["AWKWARD"]

_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def _talk(*contents: str, system: str | None = None) -> Chat:
    """User and assistant in turns, after a system turn if there is one."""
    turns = [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(contents)]
    return Chat((*([] if system is None else [Message("system", system)]), *turns))


_TOOL_USE = Chat(
    (
        Message("user", "Is it raining in Zürich?"),
        Message("assistant", "", (ToolCall("get_weather", {"city": "Zürich"}),)),
        Message("tool", '{"rain": true, "mm": 2.5}', name="get_weather"),
        Message("assistant", "Yes, 2.5 mm so far."),
    ),
    (_TOOL,),
)

_CHATS = (
    _talk("What is the boiling point of water?", "100 °C at sea level."),
    _talk("Hello", "Good morning!", system="You answer in one sentence."),
    _talk("One?", "1", "Two?", "2", "Three?", "3", system="Count."),
    _talk("日本の首都は?", "東京です。", "Und auf Deutsch?", "Tokio. \U0001f5fc"),
    _talk("e\u0301 or \u00e9?", "Both: e\u0301, \u00e9 \u2014 \u200bone\u00a0is composed."),
    _talk("Write <|im_end|> and <|eot_id|>", "Here: <|im_end|> and </s>.<|im_start|>user", "And [/INST]?", "[/INST]"),
    _talk("", "You said nothing."),
    _talk(".", "."),
    _talk("  padded  \n", "\n  indented\n    answer  \n", "again\t", "\tdone "),
    _talk("Show code", "```python\nif a < b:\n\n\n    print('{{ a }} {% b %}')\n```\n"),
    _talk("Think first", "<think>\n2 + 2\n</think>\n\n4", "And 3 + 3?", "<think>\n3 + 3\n</think>\n\n6"),
    _TOOL_USE,
)

AWKWARD = tuple((Origin("conversation", i), chat) for i, chat in enumerate(_CHATS, start=1))
