"""Several answers become the best and the worst, or a reason why not."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.examples import Message, Preference
from luthier.evaluate.ranking import Candidates, Ranked, rank
from luthier.evaluate.verdicts import Judge, Question, ScalarJudge, Verdict
from luthier.rollout.scoring import Answered, Failure, Score

PROMPT = (Message("user", "?"),)


class ByLength:
    """Compares by length; what holds an x makes it fail, what holds a question mark is a tie with all."""

    def compare(self, questions: Sequence[Question]) -> list[Verdict]:
        return [self.verdict(question) for question in questions]

    def verdict(self, question: Question) -> Verdict:
        if "x" in question.first + question.second:
            return Verdict("failed", Failure("refused"))
        difference = len(question.first) - len(question.second)
        if not difference or "?" in question.first + question.second:
            return Verdict("tie")
        return Verdict("first" if difference > 0 else "second")


def lengths(answered: Sequence[Answered]) -> list[Score]:
    return [Failure("refused") if "x" in one.answer else float(len(one.answer)) for one in answered]


JUDGES = [ByLength(), ScalarJudge(lengths)]


def texts(ranked: Ranked) -> list[str]:
    assert ranked.preference is not None
    return [answer[0].content for answer in ranked.preference.answers]


@pytest.mark.parametrize("judge", JUDGES)
def test_the_best_and_the_worst_become_a_preference(judge: Judge) -> None:
    tools = ({"name": "f"},)
    (ranked,), report = rank(judge, [Candidates(PROMPT, ("bb", "aaaa", "c", "ddd"), tools)])
    expected = Preference(
        PROMPT,
        ((Message("assistant", "aaaa"),), (Message("assistant", "c"),)),
        tools,
        scores=(4.0, 1.0) if isinstance(judge, ScalarJudge) else None,
    )
    assert ranked == Ranked(expected)
    assert (report.num_asked, report.num_decided) == (6, 6)


@pytest.mark.parametrize("judge", JUDGES)
def test_prompts_are_ranked_apart_and_in_their_order(judge: Judge) -> None:
    ranked, report = rank(judge, [Candidates(PROMPT, ("a", "bb")), Candidates(PROMPT, ("ccc", "d", "ee"))])
    assert [texts(one) for one in ranked] == [["bb", "a"], ["ccc", "d"]]
    assert report.num_asked == 1 + 3


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        (("a", "b"), "tie"),
        (("a", "b", "c"), "tie"),
        (("a", "a"), "equal answers"),
        (("a",), "equal answers"),
        ((), "equal answers"),
        (("a", "bx"), "refused"),
        (("ax", "bx", "c"), "refused"),
    ],
)
def test_where_there_is_no_pair_the_reason_is_said(judge: Judge, answers: tuple[str, ...], reason: str) -> None:
    ranked, _ = rank(judge, [Candidates(PROMPT, answers)])
    assert ranked == [Ranked(None, reason)]


@pytest.mark.parametrize("judge", JUDGES)
def test_one_answer_that_cannot_be_judged_leaves_the_others_their_pair(judge: Judge) -> None:
    (ranked,), report = rank(judge, [Candidates(PROMPT, ("x", "a", "bbb"))])
    assert texts(ranked) == ["bbb", "a"]
    assert report.failed == {"refused": 2}


def test_a_circle_is_a_tie() -> None:
    """Rock beats scissors, scissors beat paper, paper beats rock: one win and one loss each."""

    class Game:
        def compare(self, questions: Sequence[Question]) -> list[Verdict]:
            wins = {("rock", "scissors"), ("scissors", "paper"), ("paper", "rock")}
            return [Verdict("first" if (q.first, q.second) in wins else "second") for q in questions]

    assert rank(Game(), [Candidates(PROMPT, ("rock", "scissors", "paper"))])[0] == [Ranked(None, "tie")]


@given(st.lists(st.lists(st.text("abx?", max_size=4), max_size=4).map(tuple), max_size=4))
def test_nothing_is_lost_and_both_kinds_of_judge_agree_where_all_are_comparable(answers: list[tuple[str, ...]]) -> None:
    candidates = [Candidates(PROMPT, one) for one in answers]
    for judge in JUDGES:
        ranked, report = rank(judge, candidates)
        assert len(ranked) == len(candidates)
        assert all((one.preference is None) == bool(one.reason) for one in ranked)
        assert report.num_asked == report.num_decided + report.num_ties + sum(report.failed.values())
    if not any("?" in text or "x" in text for one in answers for text in one):
        by_comparing, by_number = (rank(judge, candidates)[0] for judge in JUDGES)
        for one, other in zip(by_comparing, by_number, strict=True):
            assert one.reason == other.reason
            assert one.preference is None or texts(one) == texts(other)
