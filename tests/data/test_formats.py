"""Each format's rows become the example that they mean, and a row that means none is refused with field and value."""

import json
from typing import Any

import pytest

from luthier.data.examples import Chat, Example, Message, Text, ToolCall
from luthier.data.formats import FORMATS, check_names, map_columns, recognise, to_example
from luthier.errors import DataError

ASK, REPLY = Message("user", "Why?"), Message("assistant", "So.")
TALK = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
SHARED = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
FIND = {"name": "find", "parameters": {"type": "object", "properties": {}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"n": 1}'}}

MEANINGS: list[tuple[str, dict[str, Any], Example]] = [
    ("messages", {"messages": TALK}, Chat((ASK, REPLY))),
    ("messages", {"messages": json.dumps(TALK)}, Chat((ASK, REPLY))),
    ("messages", {"messages": TALK, "system": "Be brief."}, Chat((Message("system", "Be brief."), ASK, REPLY))),
    ("sharegpt", {"conversations": SHARED, "system": ""}, Chat((ASK, REPLY))),
    ("sharegpt", {"conversation": TALK}, Chat((ASK, REPLY))),
    ("alpaca", {"instruction": "Why?", "input": "", "output": "So."}, Chat((ASK, REPLY))),
    ("alpaca", {"instruction": "Why?", "input": None, "output": "So.", "text": "rendered"}, Chat((ASK, REPLY))),
    (
        "alpaca",
        {"instruction": "Add", "input": "1 2", "output": "3"},
        Chat((Message("user", "Add\n\n1 2"), Message("assistant", "3"))),
    ),
    (
        "alpaca",
        {"instruction": "Why?", "output": "So.", "system": "Be brief.", "history": [["Hm?", "Yes."]]},
        Chat((Message("system", "Be brief."), Message("user", "Hm?"), Message("assistant", "Yes."), ASK, REPLY)),
    ),
    ("prompt_completion", {"prompt": "Why?", "completion": "So."}, Chat((ASK, REPLY))),
    ("prompt_completion", {"prompt": "Why?", "response": "So."}, Chat((ASK, REPLY))),
    ("prompt_completion", {"prompt": TALK[:1], "completion": TALK[1:]}, Chat((ASK, REPLY))),
    ("question_answer", {"question": "Why?", "answer": "So.", "id": 7}, Chat((ASK, REPLY))),
    (
        "question_answer",
        {"question": "Why?", "answers": {"text": ["So.", "Thus."], "answer_start": [0, 9]}},
        Chat((ASK, REPLY)),
    ),
    ("question_answer", {"question": "Why?", "answers": [{"text": "So."}]}, Chat((ASK, REPLY))),
    (
        "question_answer",
        {"context": "A fact.", "question": "Why?", "answer": "So."},
        Chat((Message("user", "A fact.\n\nWhy?"), REPLY)),
    ),
    ("text", {"text": " Once.\n"}, Text(" Once.\n")),
    ("text", {"content": "Once.", "label": 3}, Text("Once.")),
]


@pytest.mark.parametrize(("name", "row", "meaning"), MEANINGS)
def test_a_row_is_recognised_and_becomes_the_example_it_means(name: str, row: dict[str, Any], meaning: Example) -> None:
    assert recognise(row) == name
    assert to_example(row, name) == meaning


def test_every_format_to_imitate_has_a_row_that_shows_its_meaning() -> None:
    assert {name for name, _, _ in MEANINGS} == {name for name, known in FORMATS.items() if known.task == "imitate"}


@pytest.mark.parametrize(
    "value", ['{"name": "find", "arguments": {"n": 1}}', '[{"name": "find", "arguments": "{\\"n\\": 1}"}]']
)
@pytest.mark.parametrize("tools", [[FIND], json.dumps([FIND]), [{"type": "function", "function": FIND}]])
def test_sharegpt_tool_turns_become_calls_and_results(value: str, tools: Any) -> None:
    turns = [SHARED[0], {"from": "function_call", "value": value}, {"from": "observation", "value": "[]"}, SHARED[1]]
    asked = Message("assistant", "", (ToolCall("find", {"n": 1}),))
    expected = Chat((ASK, asked, Message("tool", "[]"), REPLY), ({"type": "function", "function": FIND},))
    assert to_example({"conversations": turns, "tools": tools}, "sharegpt") == expected


def test_words_and_the_calls_that_follow_them_are_one_answer() -> None:
    turns = [*SHARED, {"from": "function_call", "value": '{"name": "find", "arguments": {}}'}]
    example = to_example({"conversations": turns}, "sharegpt")
    assert example == Chat((ASK, Message("assistant", "So.", (ToolCall("find", {}),))))


def test_openai_calls_results_parts_and_weights_are_read() -> None:
    turns = [
        {"role": "developer", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0},
        {"role": "tool", "content": "", "tool_call_id": "c1"},
        {"role": "assistant", "content": "So.", "train": True, "name": "Ada"},
    ]
    called = Message("assistant", "", (ToolCall("find", {"n": 1}, "c1"),), trained=False)
    answered = Message("assistant", "So.", name="Ada", trained=True)
    found = Message("tool", "", name="find", tool_call_id="c1")
    expected = Chat((Message("system", ""), ASK, called, found, answered))
    assert to_example({"messages": turns}, "messages") == expected


def test_users_may_speak_twice_and_assistants_first() -> None:
    turns = [{"from": "gpt", "value": "Hello."}, SHARED[0], *SHARED]
    example = to_example({"conversations": turns}, "sharegpt")
    assert isinstance(example, Chat)
    assert [message.role for message in example.messages] == ["assistant", "user", "user", "assistant"]


def turn(role: Any, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("alpaca", {"instruction": "Why?"}, r'has no "output" or "response" \(format alpaca needs'),
        ("alpaca", {"instruction": "Why?", "output": "  "}, '"output" is empty'),
        ("alpaca", {"instruction": "Why?", "output": 42}, '"output" is the number 42, not text'),
        ("alpaca", {"instruction": "Why?", "output": "So.", "input": ["x"]}, '"input" is a list, not text'),
        ("alpaca", {"instruction": "Why?", "output": "So.", "history": [["x"]]}, 'entry 1 of "history" is a list'),
        ("question_answer", {"question": "Why?", "answer": []}, '"answer" is an empty list, not text'),
        ("question_answer", {"question": "Why\0?", "answer": "So."}, "NUL character at position 4"),
        ("text", {"text": "a\ud800"}, "half of a surrogate pair at position 2"),
        ("prompt_completion", {"prompt": TALK, "completion": {}}, '"completion" is an empty object, not text'),
    ],
)
def test_a_field_that_does_not_fit_is_named_with_what_was_found(name: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        to_example(row, name)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "no turn is the assistant's"),
        ("So.", '"messages" is not valid JSON'),
        ({"role": "user"}, '"messages" is an object, not a list'),
        ([*TALK, "So."], 'turn 3 of "messages" is the text "So."'),
        ([turn("bot", "So.")], '"role" of turn 1 of "messages" is the text "bot"; known are'),
        ([turn(None, "So.")], '"role" of turn 1 of "messages" is null, not text'),
        ([turn("user", "Why?")], "no turn is the assistant's"),
        ([TALK[0], turn("assistant", " ")], '"content" of turn 2 of "messages" is empty'),
        ([TALK[0], turn("assistant", None)], '"content" of turn 2 of "messages" is null'),
        ([*TALK, TALK[0]], "the last turn is the user's and nothing answers it"),
        ([*TALK, turn("system", "x"), TALK[1]], "turn 3 is a system message"),
        ([turn("tool", "x"), *TALK], "a tool answers before the assistant"),
        ([TALK[0], turn("assistant", [{"type": "image_url"}])], 'of type the text "image_url"; only text'),
        ([TALK[0], turn("assistant", "x", weight=0.5)], '"weight" of turn 2 .* is the number 0.5; it must be 0 or 1'),
        ([turn("user", "x", tool_calls=[CALL]), TALK[1]], "is the user's and cannot call tools"),
        ([TALK[0], turn("assistant", "", tool_calls=["find"])], 'holds the text "find", not a call'),
        ([TALK[0], turn("assistant", "", tool_calls=[{"name": "f"}])], 'a call without "arguments"'),
        (
            [TALK[0], turn("assistant", "", tool_calls=[{"name": "f", "arguments": "{"}])],
            '"arguments" .* not valid JSON',
        ),
        ([TALK[0], turn("assistant", "", tool_calls=[{"name": "f", "arguments": [1]}])], "is a list, not an object"),
        ([TALK[0], turn("assistant", "", tool_calls=[{"name": "", "arguments": {}}])], '"name" in .* is empty'),
        ([TALK[0], turn("tool", "x", tool_call_id="c9"), TALK[1]], '"tool_call_id" of turn 2 .* no call before it has'),
        ([TALK[0], turn("function_call", "{}x"), TALK[1]], '"content" of turn 2 of "messages" is not valid JSON'),
    ],
)
def test_a_conversation_that_cannot_be_trained_on_is_refused_with_the_turn(turns: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        to_example({"messages": turns}, "messages")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"tools": "{"}, '"tools" is not valid JSON'),
        ({"tools": {"name": "find"}}, '"tools" is an object, not a list'),
        ({"tools": ["find"]}, '"tools" holds the text "find", not a function description'),
        ({"tools": [{"description": "x"}]}, '"name" of a tool is null'),
        ({"tools": [{"name": "f", "x": float("nan")}]}, '"tools" holds nan, which JSON cannot write'),
        ({"tools": [{"name": "f", "x": b"1"}]}, '"tools" holds a value of type bytes, which JSON cannot write'),
        ({"system": 3}, '"system" is the number 3, not text'),
    ],
)
def test_tools_and_system_texts_that_do_not_fit_are_refused(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        to_example({"messages": TALK, **row}, "messages")


def test_two_different_system_texts_are_refused_and_equal_ones_are_one() -> None:
    turns = [turn("system", "Be brief."), *TALK]
    same = to_example({"messages": turns, "system": "Be brief."}, "messages")
    assert same == to_example({"messages": turns}, "messages")
    with pytest.raises(DataError, match="two different system messages"):
        to_example({"messages": turns, "system": "Be long."}, "messages")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"Frage": "x", "Antwort": "y"},
            r'"Frage", "Antwort" fit no known format: messages \(messages\); .*columns: {',
        ),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, '"chosen", "rejected" is a preference pair .* with dpo'),
        ({"prompt": "x", "responses": ["y", "z"]}, '"prompt", "responses" is a preference pair or ranking'),
        ({"messages": TALK, "label": False}, '"messages", "label" is an answer with a verdict, .* with kto'),
        ({"instruction": "x", "output": "y", "kto_tag": True}, '"kto_tag" is an answer with a verdict'),
        ({"image": "a.png", "question": "x", "answer": "y"}, '"image" is a picture with text'),
        ({"question": "x", "answer": None}, "fit no known format"),
        ({}, "fit no known format"),
    ],
)
def test_columns_of_no_format_or_of_another_task_are_refused(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        recognise(row)


def test_mapped_columns_take_the_place_of_the_canonical_ones() -> None:
    row = {"Frage": "Why?", "answer": 3, "long_answer": "So."}
    mapped = map_columns(row, {"question": "Frage", "answer": "long_answer"})
    assert to_example(mapped, recognise(mapped)) == Chat((ASK, REPLY))
    assert map_columns({"a": 1, "b": 2}, {"a": "b", "b": "a"}) == {"a": 2, "b": 1}
    with pytest.raises(DataError, match='has no column "Antwort", which `columns` names; the columns are "Frage"'):
        map_columns(row, {"answer": "Antwort"})


def test_unknown_names_are_refused_with_the_nearest() -> None:
    check_names("alpaca", {"instruction": "Auftrag"})
    with pytest.raises(DataError, match=r'format "alpacca" is not known; is "alpaca" meant\?'):
        check_names("alpacca", {})
    with pytest.raises(DataError, match=r'maps "questions", which is no column; is "question" meant\?'):
        check_names(None, {"questions": "Frage"})
    with pytest.raises(DataError, match="known are text, content"):
        check_names("text", {"question": "Frage"})
