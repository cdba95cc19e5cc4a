"""Questions with choices, of which one is right: rows as MMLU and its kin have them, and their tokens.

A choice is read as the text that follows "Question: ..." and "Answer:", without the others in sight: how likely a model
holds it tells what the model knows. To choose between letters is a skill of its own, which small models lack: they
guess at chance whatever they know, and what is at chance cannot fall.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.data.examples import Origin
from luthier.data.masks import encode_continuation
from luthier.data.sequences import TokenGroup
from luthier.data.sources import BadRow, Row, read_rows
from luthier.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Question", "encode_question", "read_questions"]

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Question:
    """answer: the index of the right choice."""

    question: str
    choices: tuple[str, ...]
    answer: int
    origin: Origin


def read_questions(patterns: str | Sequence[str]) -> list[Question]:
    """All questions of the files that the patterns name. Raises DataError at the first row that is none."""
    return [_question(row) for row in read_rows(patterns)]


def encode_question(question: Question, tokenizer: PreTrainedTokenizerBase) -> TokenGroup:
    """A sequence for each choice, the choice trained; the right one's score is 1, the others' 0."""
    start = f"Question: {question.question.strip()}\nAnswer:"
    ends = (f" {choice}" for choice in question.choices)
    sequences = tuple(encode_continuation(start, end, question.origin, tokenizer) for end in ends)
    return TokenGroup(sequences, tuple(float(i == question.answer) for i in range(len(sequences))))


def _question(row: Row | BadRow) -> Question:
    if isinstance(row, BadRow):
        raise DataError(f"{row.origin}: {row.reason}; mend the row or drop it")
    if problem := next(_problems(row.values), None):
        raise DataError(f"{row.origin}: {problem}; a row has question, choices and answer, an index from 0 or a letter")
    choices = tuple(choice.strip() for choice in row.values["choices"])
    return Question(row.values["question"], choices, _index(row.values["answer"]), row.origin)


def _problems(values: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a row, before anything follows from it."""
    question, choices, answer = (values.get(name) for name in ("question", "choices", "answer"))
    if not isinstance(question, str) or not question.strip():
        yield '"question" is no text'
    if not isinstance(choices, list) or len(choices) < 2:
        yield '"choices" is no list of two or more'
        return
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        yield "a choice is no text"
    admitted = [*range(len(choices)), *_LETTERS[: len(choices)]]
    if isinstance(answer, bool) or answer not in admitted:
        yield f'"answer" is {answer!r}, which is none of the {len(choices)} choices'


def _index(answer: int | str) -> int:
    return answer if isinstance(answer, int) else _LETTERS.index(answer)
