"""Several answers to each prompt become one preference: the best and the worst, or none with the reason.

Judges that compare are asked about every pair in both orders, and an answer's strength is its share of won comparisons
(Copeland's method). Judges that give numbers are asked once for each answer. All prompts are judged together, so that
a judge can work on many questions at once. Equal answers are never compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from luthier.data.examples import Message, Preference
from luthier.evaluate.verdicts import (
    Judge,
    JudgeReport,
    Question,
    ScalarJudge,
    Verdict,
    compare_both_orders,
    verdict_by_scores,
)
from luthier.rollout.scoring import Answered, Failure, Score

__all__ = ["Candidates", "Ranked", "rank"]

_Answers = tuple[str, ...]

_POINTS = {"first": 1.0, "tie": 0.5, "second": 0.0}  # of the first answer


@dataclass(frozen=True, slots=True)
class Candidates:
    """Answers to one prompt. row: what the prompt was read from, for rules."""

    prompt: tuple[Message, ...]
    answers: tuple[str, ...]
    tools: tuple[dict[str, Any], ...] = ()
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ranked:
    """The best and the worst answer to a prompt, or why there is no such pair: equal answers, tie, a failure's reason.

    Of a judge that gives numbers, the preference has them as its scores.
    """

    preference: Preference | None
    reason: str = ""


def rank(judge: Judge, candidates: Sequence[Candidates]) -> tuple[list[Ranked], JudgeReport]:
    """One result for each prompt, in their order; the report counts comparisons of two answers."""
    distinct = [tuple(dict.fromkeys(one.answers)) for one in candidates]
    scores: list[list[Score]] = [[] for _ in candidates]
    if isinstance(judge, ScalarJudge):
        scores = _scored(judge, candidates, distinct)
        verdicts = [[verdict_by_scores(*pair) for pair in combinations(row, 2)] for row in scores]
        report = JudgeReport.of([verdict for row in verdicts for verdict in row])
    else:
        verdicts, report = _compared(judge, candidates, distinct)
    return list(map(_ranked, candidates, distinct, verdicts, scores)), report


def _scored(judge: ScalarJudge, candidates: Sequence[Candidates], distinct: Sequence[_Answers]) -> list[list[Score]]:
    """The number of every answer to every prompt, all asked for at once."""
    pairs = zip(candidates, distinct, strict=True)
    scores = iter(judge.score([Answered(one.prompt, answer, one.row) for one, answers in pairs for answer in answers]))
    return [[next(scores) for _ in answers] for answers in distinct]


def _compared(
    judge: Judge, candidates: Sequence[Candidates], distinct: Sequence[_Answers]
) -> tuple[list[list[Verdict]], JudgeReport]:
    """The verdict on every pair of answers to every prompt, all asked for at once."""
    questions = [
        [Question(one.prompt, first, second, one.row) for first, second in combinations(answers, 2)]
        for one, answers in zip(candidates, distinct, strict=True)
    ]
    found, report = compare_both_orders(judge, [question for row in questions for question in row])
    verdicts = iter(found)
    return [[next(verdicts) for _ in row] for row in questions], report


def _ranked(one: Candidates, answers: _Answers, verdicts: Sequence[Verdict], scores: Sequence[Score]) -> Ranked:
    strengths = _strengths(len(answers), verdicts)
    if not strengths:
        reasons = [verdict.failure.reason for verdict in verdicts if verdict.failure]
        return Ranked(None, reasons[0] if reasons else "equal answers")
    best, worst = max(strengths, key=strengths.__getitem__), min(strengths, key=strengths.__getitem__)
    if strengths[best] == strengths[worst]:
        return Ranked(None, "tie")
    numbers = {i: score for i, score in enumerate(scores) if not isinstance(score, Failure)}
    return Ranked(
        Preference(
            prompt=one.prompt,
            answers=tuple((Message("assistant", answers[i]),) for i in (best, worst)),
            tools=one.tools,
            scores=(numbers[best], numbers[worst]) if numbers else None,
        )
    )


def _strengths(num_answers: int, verdicts: Sequence[Verdict]) -> dict[int, float]:
    """(wins + ties / 2) / comparisons of each answer that was compared at all, in the order of the answers."""
    points: list[list[float]] = [[] for _ in range(num_answers)]
    for (first, second), verdict in zip(combinations(range(num_answers), 2), verdicts, strict=True):
        if verdict.outcome != "failed":
            gained = _POINTS[verdict.outcome]
            points[first].append(gained)
            points[second].append(1 - gained)
    return {answer: sum(won) / len(won) for answer, won in enumerate(points) if won}
