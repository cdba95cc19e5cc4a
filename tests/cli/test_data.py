"""`luthier data` on preferences: shown, checked, counted and converted for what their columns say they are."""

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.cli.main import main
from luthier.data.examples import Message, Preference
from luthier.data.reading import read_examples

RANKED = {"prompt": "Why?", "responses": ["Soon.", "Never.", "Later."], "scores": [1, 3, 2]}
JUDGED = {"prompt": "Why?", "completion": "Soon.", "label": False}


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert not end.value.code
    return capsys.readouterr().out


def file_of(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def test_preview_shows_the_prompt_once_and_the_answers_best_first(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(capsys, "data", "preview", file_of(tmp_path / "a.jsonl", RANKED), "--model", str(chat_model))
    assert text.count("Why?") == 1
    marks = ["Why?", "answer 1 of 3, the best, score 3", "Never.", "answer 2 of 3, score 2", "Later.", "Soon."]
    places = [text.index(mark) for mark in marks]
    assert places == sorted(places)


def test_preview_says_whether_an_answer_is_desirable(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(capsys, "data", "preview", file_of(tmp_path / "a.jsonl", JUDGED), "--model", str(chat_model))
    assert text.index("Why?") < text.index("undesirable: 6 tokens") < text.index("Soon.")


def test_stats_count_a_shared_prompt_once(chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """<|im_start|>user, a line end, Why?, <|im_end|>, a line end, <|im_start|>assistant and a line end are 23 tokens of
    this byte tokenizer; the answers with their end 6, 7 and 7.
    """
    text = said(capsys, "data", "stats", file_of(tmp_path / "a.jsonl", RANKED), "--model", str(chat_model))
    assert "ranking (1)" in text
    assert "43, of them trained 20 (47%)" in text


def test_validate_counts_rows_of_every_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = [RANKED, JUDGED, {"text": "Once."}]
    files = [file_of(tmp_path / f"{i}.jsonl", row) for i, row in enumerate(rows)]
    assert "3 rows: 3 good, 0 bad" in said(capsys, "data", "validate", *files)


def test_convert_writes_preferences_that_are_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = {"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."}
    output = tmp_path / "b.jsonl"
    said(capsys, "data", "convert", file_of(tmp_path / "a.jsonl", pair), "--output", str(output))
    assert list(json.loads(output.read_text("utf-8"))) == ["prompt", "chosen", "rejected"]
    answers = tuple((Message("assistant", text),) for text in ("So.", "No."))
    ((_, example),) = read_examples(str(output), task="prefer").examples
    assert example == Preference((Message("user", "Why?"),), answers)
