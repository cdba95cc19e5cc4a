"""What is written is read back as it was, and a file that could not be finished does not appear."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.examples import Chat, Example, Feedback, Message, Preference, Prompt, Steps, Text, ToolCall
from luthier.data.reading import read_examples
from luthier.data.writing import write_examples
from luthier.errors import DataError

unhurried = settings(deadline=None)  # files are synced to the disk, which takes as long as it takes
characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
anything = st.text(characters, max_size=12)
words = anything.filter(str.strip)
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | anything,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(anything, inner, max_size=3),
    max_leaves=5,
)
objects = st.dictionaries(anything, values, max_size=3)
calls = st.lists(st.builds(ToolCall, words, objects, st.none() | words), min_size=1, max_size=2).map(tuple)
names, marks = st.none() | words, st.none() | st.booleans()
users = st.builds(Message, st.just("user"), words, st.just(()), names, marks)
answers = st.builds(Message, st.just("assistant"), words, st.just(()) | calls, names, marks)
callers = st.builds(Message, st.just("assistant"), anything, calls, names, marks)
results = st.builds(Message, st.just("tool"), anything, st.just(()), names, marks)
answering = st.builds(Message, st.just("tool"), anything, st.just(()), words, marks, words)
systems = st.builds(Message, st.just("system"), anything, st.just(()), names, marks)
labelled = st.lists(st.tuples(words, st.booleans()), min_size=1, max_size=3)
tools = st.builds(lambda name, more: {"type": "function", "function": {**more, "name": name}}, words, objects)


@st.composite
def chats(draw: st.DrawFn) -> Chat:
    """Any conversation that can be trained on: a system text first or none, results after calls, an answer last."""
    body: list[Message] = draw(st.lists(users, max_size=2))
    if draw(st.booleans()):
        body += [draw(callers), *draw(st.lists(results | answering, max_size=2)), *draw(st.lists(users, max_size=1))]
    turns = [*draw(st.lists(systems, max_size=1)), *body, draw(answers | callers)]
    return Chat(tuple(turns), tuple(draw(st.lists(tools, max_size=2))))


@unhurried
@given(st.lists(chats(), min_size=1, max_size=4))
def test_conversations_written_as_messages_are_read_back_equal(examples: list[Chat]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made" / "a.jsonl"
        assert write_examples(examples, path) == len(examples)
        reading = read_examples(str(path))
    assert [example for _, example in reading.examples] == examples
    assert reading.formats == {str(path): "messages"}


texts = st.lists(words, min_size=2, max_size=4, unique_by=str.strip)


@st.composite
def preferences(draw: st.DrawFn) -> Preference:
    """A pair or a ranking behind a prompt that ends with a question; scores never rise and are not all equal."""
    prompt = (*draw(st.lists(systems, max_size=1)), draw(users))
    answers = tuple((Message("assistant", text),) for text in draw(texts))
    falls = draw(st.lists(st.integers(0, 3), min_size=len(answers) - 1, max_size=len(answers) - 1))
    scores = tuple(float(-sum(falls[:place])) for place in range(len(answers)))
    return Preference(prompt, answers, (), scores if any(falls) and draw(st.booleans()) else None)


@unhurried
@given(st.lists(preferences().filter(lambda one: len(one.answers) == 2), min_size=1, max_size=3))
def test_pairs_are_read_back_equal(examples: list[Example]) -> None:
    assert written_and_read(examples) == examples


@unhurried
@given(st.lists(preferences().filter(lambda one: len(one.answers) > 2), min_size=1, max_size=3))
def test_rankings_are_read_back_equal(examples: list[Example]) -> None:
    assert written_and_read(examples) == examples


@unhurried
@given(st.builds(Feedback, st.builds(lambda *turns: Chat(turns), users, answers), st.booleans()))
def test_feedback_is_read_back_equal(example: Feedback) -> None:
    assert written_and_read([example]) == [example]


@unhurried
@given(st.builds(lambda *turns: Prompt(turns), systems, users))
def test_prompts_are_read_back_equal(example: Prompt) -> None:
    (found,) = written_and_read([example])
    assert isinstance(found, Prompt)
    assert (found.messages, found.tools) == (example.messages, example.tools)


@unhurried
@given(st.builds(lambda turn, steps: Steps((turn,), *map(tuple, zip(*steps, strict=True))), users, labelled))
def test_steps_are_read_back_equal(example: Steps) -> None:
    assert written_and_read([example]) == [example]


def written_and_read(examples: list[Example]) -> list[Example]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        write_examples(examples, path)
        return [example for _, example in read_examples(str(path), task=None).examples]


def test_examples_of_several_kinds_and_plain_text_are_refused(tmp_path: Path) -> None:
    chat = Chat((Message("user", "Why?"), Message("assistant", "So.")))
    with pytest.raises(DataError, match="several kinds"):
        write_examples([chat, Feedback(chat, True)], tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="plain text cannot be written as messages"):
        write_examples([Text("Once.")], tmp_path / "a.jsonl")


def test_a_file_that_cannot_be_finished_leaves_what_stood_there(tmp_path: Path) -> None:
    chat: Any = Chat((Message("user", "Why?"), Message("assistant", "So.")))
    path = tmp_path / "a.jsonl"
    write_examples([chat], path)
    before = path.read_bytes()
    broken: list[Example] = [chat, Text("Once.")]
    with pytest.raises(DataError, match="several kinds"):
        write_examples(broken, path)
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (before, [path])


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written \(.*\); choose another place"):
        write_examples([], tmp_path / "file" / "a.jsonl")
