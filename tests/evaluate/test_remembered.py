"""A judge that remembers says what it said, and is asked for the rest alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.examples import Message
from luthier.evaluate.remembered import AT_A_TIME, Remembered
from luthier.evaluate.verdicts import Question, Verdict, compare_both_orders
from luthier.rollout.scoring import Failure

PROMPT = (Message("user", "?"),)
QUESTIONS = [Question(PROMPT, str(i), "another") for i in range(2 * AT_A_TIME + 5)]


@dataclass
class Counting:
    """Prefers the longer answer, fails for empty ones, and dies when it has been asked `lives` times."""

    lives: int = 1000
    asked: list[Question] = field(default_factory=list)

    def compare(self, questions: Sequence[Question]) -> list[Verdict]:
        if self.lives == 0:
            raise KeyboardInterrupt
        self.lives -= 1
        self.asked += questions
        return [self._compare(question) for question in questions]

    def _compare(self, question: Question) -> Verdict:
        if not (question.first and question.second):
            return Verdict("failed", Failure("tired"))
        return Verdict("first" if len(question.first) > len(question.second) else "second")


def test_what_was_heard_before_an_interruption_is_not_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "round-0" / "verdicts.jsonl"
    with pytest.raises(KeyboardInterrupt):
        Remembered(Counting(lives=2), path).compare(QUESTIONS)
    after = Counting()
    assert Remembered(after, path).compare(QUESTIONS) == Counting().compare(QUESTIONS)
    assert after.asked == QUESTIONS[2 * AT_A_TIME :]


def test_a_line_that_a_kill_cut_short_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    Remembered(Counting(), path).compare(QUESTIONS[:3])
    path.write_text(path.read_text()[:-9])
    after = Counting()
    assert Remembered(after, path).compare(QUESTIONS[:4]) == Counting().compare(QUESTIONS[:4])
    assert after.asked == QUESTIONS[2:4]
    again = Counting()
    Remembered(again, path).compare(QUESTIONS[:4])
    assert not again.asked


def test_what_failed_is_asked_again(tmp_path: Path) -> None:
    asked = [Question(PROMPT, "", "b"), Question(PROMPT, "aa", "b")]
    Remembered(Counting(), tmp_path / "verdicts.jsonl").compare(asked)
    after = Counting()
    found = Remembered(after, tmp_path / "verdicts.jsonl").compare(asked)
    assert after.asked == asked[:1]
    assert [verdict.outcome for verdict in found] == ["failed", "first"]


texts = st.text("abé\n\0\ud800", max_size=3)


@given(asked=st.lists(st.builds(Question, st.just(PROMPT), texts, texts), max_size=8), before=st.integers(0, 8))
def test_memory_changes_no_verdict(
    asked: list[Question], before: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("judged") / "verdicts.jsonl"
    Remembered(Counting(), path).compare(asked[:before])
    remembered = Remembered(Counting(), path)
    assert compare_both_orders(remembered, asked) == compare_both_orders(Counting(), asked)
