"""Rows in = examples + bad rows, whichever way the reading goes, and what was recognised is said."""

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.data.examples import Chat, Message, Origin, Text
from luthier.data.reading import read_examples
from luthier.errors import DataError

GOOD = {"question": "Why?", "answer": "So."}
EXAMPLE = Chat((Message("user", "Why?"), Message("assistant", "So.")))


def lines(path: Path, *rows: Any) -> str:
    """Writes each row as JSON, texts as they stand."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return str(path)


def test_examples_come_with_their_origin_and_the_format_of_each_file(tmp_path: Path) -> None:
    first, second = lines(tmp_path / "a.jsonl", GOOD, GOOD), lines(tmp_path / "b.jsonl", {"text": "Once."})
    reading = read_examples(str(tmp_path))
    assert reading.examples == [
        (Origin(first, 1), EXAMPLE),
        (Origin(first, 2), EXAMPLE),
        (Origin(second, 1), Text("Once.")),
    ]
    assert (reading.bad, reading.num_rows) == ([], 3)
    assert reading.formats == {first: "question_answer", second: "text"}


def test_stop_names_the_first_bad_row_and_counts_all_of_them(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", GOOD, {"question": "Why?"}, "{", GOOD)
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert str(caught.value).startswith(f'{path}:2: has no "answer" or "answers" (format question_answer needs')
    assert "2 of 4 rows are bad: mend them, or run with --on-error skip" in str(caught.value)


def test_skip_returns_and_quarantines_each_bad_row_with_its_reason(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", GOOD, "{", {"question": "a\ud800\u2028é", "answer": "So."}, GOOD)
    quarantine = tmp_path / "run" / "quarantine.jsonl"
    reading = read_examples(path, on_error="skip", quarantine=quarantine)
    assert [origin.line for origin, _ in reading.examples] == [1, 4]
    assert [bad.origin.line for bad in reading.bad] == [2, 3]
    written = [json.loads(line) for line in quarantine.read_bytes().split(b"\n")[:-1]]
    assert [(row["file"], row["line"], row["reason"], row["raw"]) for row in written] == [
        (path, bad.origin.line, bad.reason, bad.raw) for bad in reading.bad
    ]


def test_the_format_comes_from_the_first_row_that_fits_one_and_other_shapes_are_reported(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", "{", {"id": 1}, GOOD, {"text": "Once."}, {"instruction": "x", "output": "y"})
    reading = read_examples(path, on_error="skip")
    assert reading.formats == {path: "question_answer"}
    assert [bad.origin.line for bad in reading.bad] == [1, 2, 4, 5]
    assert reading.bad[2].reason.startswith('has no "question"')


def test_a_file_of_no_known_format_is_refused_at_its_first_row_even_when_skipping(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", "{", *[{"Frage": "x", "Antwort": "y"}] * 40, GOOD)
    with pytest.raises(DataError, match=r'a\.jsonl:2: the columns "Frage", "Antwort" fit no known format'):
        read_examples(path, on_error="skip")


def test_a_file_whose_rows_are_all_bad_is_counted(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", "{", "[]", "x")
    reading = read_examples(path, on_error="skip")
    assert (reading.examples, len(reading.bad), reading.num_rows, reading.formats) == ([], 3, 3, {})


def test_columns_are_mapped_and_a_row_without_them_is_reported(tmp_path: Path) -> None:
    german = {"Frage": "Why?", "Antwort": "So."}
    path = lines(tmp_path / "a.jsonl", german, {"Frage": "Why?"})
    columns = {"question": "Frage", "answer": "Antwort"}
    reading = read_examples(path, columns=columns, on_error="skip")
    assert [example for _, example in reading.examples] == [EXAMPLE]
    assert reading.bad[0].reason.startswith('has no column "Antwort"')
    with pytest.raises(DataError, match='has no column "Antwort"'):
        read_examples(lines(tmp_path / "b.jsonl", GOOD), columns={"answer": "Antwort"})


def test_a_named_format_is_used_where_columns_say_another_task(tmp_path: Path) -> None:
    pair = {"prompt": "Why?", "completion": "So.", "chosen": "So.", "rejected": "No."}
    path = lines(tmp_path / "a.jsonl", pair)
    with pytest.raises(DataError, match="a preference pair"):
        read_examples(path)
    assert read_examples(path, format="prompt_completion").examples == [(Origin(path, 1), EXAMPLE)]
    assert read_examples(path, columns={"answer": "chosen", "question": "prompt"}).examples[0][1] == EXAMPLE
    with pytest.raises(DataError, match=r'format "promt" is not known'):
        read_examples(path, format="promt")


@pytest.mark.parametrize("name", ["alpaca_en", "glaive_toolcall_en", "gsm8k_train"])
def test_the_peers_files_are_read_as_they_are(shared_data: Path, name: str) -> None:
    path = shared_data / f"{name}.jsonl"
    reading = read_examples(str(path))
    assert reading.num_rows == len(reading.examples) == path.read_bytes().count(b"\n")
    wanted = {"alpaca_en": "alpaca", "glaive_toolcall_en": "sharegpt", "gsm8k_train": "question_answer"}
    assert reading.formats == {str(path): wanted[name]}


def test_glaive_keeps_every_call_result_and_tool(shared_data: Path) -> None:
    path = shared_data / "glaive_toolcall_en.jsonl"
    chats = [example for _, example in read_examples(str(path)).examples if isinstance(example, Chat)]
    data = path.read_text("utf-8")
    assert sum(len(message.tool_calls) for chat in chats for message in chat.messages) == data.count('"function_call"')
    assert sum(message.role == "tool" for chat in chats for message in chat.messages) == data.count('"observation"')
    assert all(tool["type"] == "function" and tool["function"]["name"] for chat in chats for tool in chat.tools)


@pytest.mark.parametrize(("name", "what"), [("dpo", "a preference pair"), ("kto", "an answer with a verdict")])
def test_preference_files_are_refused_and_say_what_they_are(shared_data: Path, name: str, what: str) -> None:
    with pytest.raises(DataError, match=rf"{name}_en_sharegpt\.jsonl:1: a row with .* is {what}"):
        read_examples(str(shared_data / f"{name}_en_sharegpt.jsonl"))


@pytest.fixture
def shared_data() -> Path:
    folder = Path(__file__).parents[2].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the data folder ../shared/data beside the checkout")
    return folder
