"""Which of two answers is better, asked so that the order of the answers decides nothing.

A judge either reads both answers at once, and is then asked in both orders, or gives each answer a number, where the
order cannot matter. Every question ends as decided, as a tie or as failed, and the counts add up.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from luthier.data.examples import Message
from luthier.rollout.scoring import Answered, Failure, Score

__all__ = [
    "TIE",
    "Judge",
    "JudgeReport",
    "Outcome",
    "Question",
    "ScalarJudge",
    "Verdict",
    "compare_both_orders",
    "verdict_by_scores",
]

Outcome = Literal["first", "second", "tie", "failed"]

_SWAPPED: dict[Outcome, Outcome] = {"first": "second", "second": "first", "tie": "tie", "failed": "failed"}


@dataclass(frozen=True, slots=True)
class Question:
    """Which of two answers to a conversation is better? row: what the prompt was read from, for rules."""

    prompt: tuple[Message, ...]
    first: str
    second: str
    row: Mapping[str, Any] = field(default_factory=dict)

    @property
    def swapped(self) -> "Question":
        """The same question in the other order."""
        return Question(self.prompt, self.second, self.first, self.row)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The better answer, a tie, or failed with the reason."""

    outcome: Outcome
    failure: Failure | None = None

    @property
    def swapped(self) -> "Verdict":
        """The same verdict, seen from the other order."""
        return Verdict(_SWAPPED[self.outcome], self.failure)


TIE = Verdict("tie")


class Judge(Protocol):
    """Whoever compares answers."""

    def compare(self, questions: Sequence[Question]) -> list[Verdict]:
        """One verdict for each question, in their order; what fails is a verdict too."""
        ...


@dataclass(frozen=True, slots=True)
class ScalarJudge:
    """A judge that gives each answer a number; the higher one is better, equal ones are a tie."""

    score: Callable[[Sequence[Answered]], list[Score]]

    def compare(self, questions: Sequence[Question]) -> list[Verdict]:
        """By the numbers of both answers; each is asked for once."""
        firsts = [Answered(q.prompt, q.first, q.row) for q in questions]
        seconds = [Answered(q.prompt, q.second, q.row) for q in questions]
        scores = self.score([*firsts, *seconds])
        return [verdict_by_scores(*pair) for pair in zip(scores[: len(firsts)], scores[len(firsts) :], strict=True)]


def verdict_by_scores(first: Score, second: Score) -> Verdict:
    """The higher number wins; without one of them there is no verdict."""
    if isinstance(first, Failure):
        return Verdict("failed", first)
    if isinstance(second, Failure):
        return Verdict("failed", second)
    return TIE if first == second else Verdict("first" if first > second else "second")


@dataclass(frozen=True, slots=True)
class JudgeReport:
    """What became of all questions: num_asked = num_decided + num_ties + the sum of failed.

    num_flips: the ties in which the judge preferred the same place in both orders. failed: how many, by reason.
    """

    num_asked: int = 0
    num_decided: int = 0
    num_ties: int = 0
    num_flips: int = 0
    failed: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, verdicts: Sequence[Verdict], *, num_flips: int = 0) -> "JudgeReport":
        """The counts of some verdicts."""
        outcomes = Counter(verdict.outcome for verdict in verdicts)
        return cls(
            num_asked=len(verdicts),
            num_decided=outcomes["first"] + outcomes["second"],
            num_ties=outcomes["tie"],
            num_flips=num_flips,
            failed=_by_reason(verdict.failure for verdict in verdicts),
        )

    def __add__(self, other: "JudgeReport") -> "JudgeReport":
        """The counts of both."""
        return JudgeReport(
            self.num_asked + other.num_asked,
            self.num_decided + other.num_decided,
            self.num_ties + other.num_ties,
            self.num_flips + other.num_flips,
            dict(Counter(self.failed) + Counter(other.failed)),
        )

    def __str__(self) -> str:
        """One line: `120 compared: 90 decided, 20 ties (12 by a flip), 10 failed (timed out 8, no verdict 2)`."""
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.failed.items())
        return (
            f"{self.num_asked} compared: {self.num_decided} decided, {self.num_ties} ties ({self.num_flips} by a flip)"
            f", {sum(self.failed.values())} failed" + (f" ({reasons})" if reasons else "")
        )


def compare_both_orders(judge: Judge, questions: Sequence[Question]) -> tuple[list[Verdict], JudgeReport]:
    """One verdict for each question, in their order: an answer wins only if it does in both places.

    Anything else that was judged is a tie, and one order that failed is a failure  (Zheng et al. 2023, section 3.4).
    A ScalarJudge is asked once, and nobody about equal answers, which are a tie.
    """
    if isinstance(judge, ScalarJudge):
        verdicts = judge.compare(questions)
        return verdicts, JudgeReport.of(verdicts)
    open_questions = [question for question in questions if question.first != question.second]
    both = judge.compare([*open_questions, *(question.swapped for question in open_questions)])
    forth, back = both[: len(open_questions)], [verdict.swapped for verdict in both[len(open_questions) :]]
    agreed = iter(map(_agreed, forth, back))
    verdicts = [TIE if question.first == question.second else next(agreed) for question in questions]
    num_flips = sum({one.outcome, other.outcome} == {"first", "second"} for one, other in zip(forth, back, strict=True))
    return verdicts, JudgeReport.of(verdicts, num_flips=num_flips)


def _agreed(one: Verdict, other: Verdict) -> Verdict:
    if "failed" in (one.outcome, other.outcome):
        return one if one.outcome == "failed" else other
    return one if one.outcome == other.outcome else TIE


def _by_reason(failures: Iterable[Failure | None]) -> dict[str, int]:
    """How many of each reason, the most frequent first."""
    return dict(Counter(failure.reason for failure in failures if failure).most_common())
