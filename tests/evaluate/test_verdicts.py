"""Laws of comparing: the order of the answers decides nothing, and the counts add up."""

from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from luthier.data.examples import Message
from luthier.evaluate.verdicts import (
    TIE,
    JudgeReport,
    Outcome,
    Question,
    ScalarJudge,
    Verdict,
    compare_both_orders,
    verdict_by_scores,
)
from luthier.rollout.scoring import Answered, Failure, Score

PROMPT = (Message("user", "?"),)
FAILED = Verdict("failed", Failure("tired"))
texts = st.text("abc", max_size=3)
questions = st.lists(st.builds(Question, st.just(PROMPT), texts, texts), max_size=8)
outcomes = st.sampled_from(["first", "second", "tie", "failed"])
scores = st.floats(allow_nan=False, allow_infinity=False) | st.builds(Failure, st.sampled_from(["a", "b"]))


@dataclass(frozen=True)
class Moody:
    """A judge whose verdict on two texts in an order is any function of them."""

    moods: dict[tuple[str, str], Outcome]
    otherwise: Outcome = "first"

    def compare(self, questions: Sequence[Question]) -> list[Verdict]:
        found = [self.moods.get((q.first, q.second), self.otherwise) for q in questions]
        return [FAILED if outcome == "failed" else Verdict(outcome) for outcome in found]


judges = st.builds(Moody, st.dictionaries(st.tuples(texts, texts), outcomes), outcomes)


@given(judges, questions)
def test_swapping_the_answers_swaps_the_verdict(judge: Moody, asked: list[Question]) -> None:
    forth, report = compare_both_orders(judge, asked)
    back, report_back = compare_both_orders(judge, [question.swapped for question in asked])
    assert back == [verdict.swapped for verdict in forth]
    assert report_back == report


@given(judges, questions)
def test_nothing_is_lost(judge: Moody, asked: list[Question]) -> None:
    verdicts, report = compare_both_orders(judge, asked)
    assert len(verdicts) == report.num_asked == len(asked)
    assert report.num_asked == report.num_decided + report.num_ties + sum(report.failed.values())
    assert report.num_flips <= report.num_ties


@given(judges, questions)
def test_equal_answers_are_never_decided(judge: Moody, asked: list[Question]) -> None:
    verdicts, _ = compare_both_orders(judge, [Question(q.prompt, q.first, q.first) for q in asked])
    assert {verdict.outcome for verdict in verdicts} <= {"tie", "failed"}


def test_an_answer_wins_only_in_both_places() -> None:
    """Rows: what the judge says in either order, from the first answer's point of view after swapping back."""
    cases = {
        ("first", "second"): "first",
        ("second", "first"): "second",
        ("first", "first"): "tie",
        ("first", "tie"): "tie",
        ("tie", "tie"): "tie",
        ("first", "failed"): "failed",
        ("failed", "tie"): "failed",
    }
    for (forth, back), expected in cases.items():
        judge = Moody({("a", "b"): forth, ("b", "a"): back})
        (verdict,), report = compare_both_orders(judge, [Question(PROMPT, "a", "b")])
        assert (verdict.outcome, report.num_flips) == (expected, int((forth, back) == ("first", "first")))


@given(scores, scores)
def test_numbers_compare_as_their_order_says(first: Score, second: Score) -> None:
    verdict = verdict_by_scores(first, second)
    if isinstance(first, float) and isinstance(second, float):
        assert (verdict.outcome == "first") == (first > second)
        assert verdict_by_scores(second, first) == verdict.swapped
    else:
        assert verdict.failure in (first, second)


def test_a_judge_that_gives_numbers_is_asked_once_for_each_answer() -> None:
    asked: list[str] = []

    def length(answered: Sequence[Answered]) -> list[Score]:
        asked.extend(one.answer for one in answered)
        return [float(len(one.answer)) for one in answered]

    verdicts, report = compare_both_orders(
        ScalarJudge(length), [Question(PROMPT, "aa", "b"), Question(PROMPT, "a", "b")]
    )
    assert verdicts == [Verdict("first"), TIE]
    assert sorted(asked) == ["a", "aa", "b", "b"]
    assert report == JudgeReport(num_asked=2, num_decided=1, num_ties=1)


def test_reports_add_up() -> None:
    one = JudgeReport(3, 1, 1, 1, {"timed out": 1})
    other = JudgeReport(4, 2, 0, 0, {"timed out": 1, "no verdict": 1})
    assert one + other == JudgeReport(7, 3, 1, 1, {"timed out": 2, "no verdict": 1})
    assert str(one + other) == "7 compared: 3 decided, 1 ties (1 by a flip), 3 failed (timed out 2, no verdict 1)"
