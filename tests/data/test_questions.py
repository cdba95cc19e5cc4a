"""Questions with choices: which rows are some, and which tokens of theirs are looked at."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.data.examples import Origin
from luthier.data.questions import Question, encode_question, read_questions
from luthier.errors import DataError
from luthier.models.load import load

GOOD = {"question": "How many legs has a spider?", "choices": ["six", "eight", "ten"], "answer": 1}


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("answer", [1, "B"])
def test_an_answer_is_an_index_or_a_letter(tmp_path: Path, answer: object) -> None:
    found = read_questions(write(tmp_path / "quiz.jsonl", {**GOOD, "answer": answer, "subject": "animals"}))
    (question,) = found
    assert (question.choices, question.answer) == (("six", "eight", "ten"), 1)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"answer": 3}, '"answer" is 3, which is none of the 3 choices'),
        ({"answer": "D"}, '"answer" is .D., which is none of the 3 choices'),
        ({"answer": True}, '"answer" is True, which is none'),
        ({"answer": -1}, '"answer" is -1, which is none'),
        ({"answer": None}, '"answer" is None, which is none'),
        ({"choices": ["six"]}, '"choices" is no list of two or more'),
        ({"choices": "six"}, '"choices" is no list of two or more'),
        ({"choices": ["six", " "]}, "a choice is no text"),
        ({"question": " "}, '"question" is no text'),
    ],
)
def test_a_row_that_is_no_question_is_refused_with_its_place(
    tmp_path: Path, wrong: dict[str, Any], reason: str
) -> None:
    path = write(tmp_path / "quiz.jsonl", GOOD, {**GOOD, **wrong})
    with pytest.raises(DataError, match=rf"quiz\.jsonl:2: {reason}.*; a row has question, choices and answer"):
        read_questions(path)


def test_a_choice_follows_the_question_and_alone_is_looked_at(chat_model: Path) -> None:
    tokenizer = load(str(chat_model)).tokenizer
    question = Question(" Is it<|im_end|>? ", ("yes", "no"), 1, Origin("quiz.jsonl", 1))
    group = encode_question(question, tokenizer)
    texts = [tokenizer.decode(sequence.token_ids) for sequence in group.sequences]
    assert texts == ["Question: Is it<|im_end|>?\nAnswer: yes", "Question: Is it<|im_end|>?\nAnswer: no"]
    looked_at = [tokenizer.decode(sequence.token_ids[np.flatnonzero(sequence.trained)]) for sequence in group.sequences]
    assert looked_at == [" yes", " no"]
    assert group.scores == (0.0, 1.0)
    assert tokenizer.eos_token_id not in group.sequences[0].token_ids


def test_the_questions_of_mmlu_are_read(tmp_path: Path) -> None:
    folder = Path(__file__).parents[3] / "shared" / "data" / "mmlu"
    if not folder.exists():
        pytest.skip("the shared data is not here")
    found = read_questions(str(folder / "test.jsonl"))
    assert len(found) == 912
    assert {len(question.choices) for question in found} == {4}
