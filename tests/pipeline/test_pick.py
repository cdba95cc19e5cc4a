"""Picking keeps what is good and can be learned, counts every other answer once, and prefers the first of equals."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.conversations import text_of
from luthier.pipeline.pick import ScoredText, pick
from luthier.recipe.sampling import AnswerSampling

REWARDS = st.sampled_from([-1.0, 0.0, 0.5, 1.0])
ANSWERS = st.lists(st.builds(ScoredText, st.sampled_from(["a", "b", "c", " ", "\0"]), st.booleans(), REWARDS))


def settings_of(keep: str = "best", **more: Any) -> AnswerSampling:
    return AnswerSampling.model_validate({"data": "a", "reward": "exact", "keep": keep, **more})


def of(*rewards: float, finished: bool = True) -> list[ScoredText]:
    return [ScoredText(f"answer {i}", finished, reward) for i, reward in enumerate(rewards)]


@given(ANSWERS, st.sampled_from(["all", "best"]), REWARDS, st.booleans())
def test_every_answer_is_kept_or_counted(answers: list[ScoredText], keep: str, least: float, truncated: bool) -> None:
    kept, dropped = pick(answers, settings_of(keep, min_reward=least, keep_truncated=truncated))
    assert len(kept) + dropped.total() == len(answers)
    assert all(count > 0 for count in dropped.values())
    assert [id(one) for one in answers if any(one is other for other in kept)] == [id(one) for one in kept]
    for one in kept:
        assert one.reward >= least
        assert one.finished or truncated
        assert text_of("an answer", one.text) == one.text


@given(ANSWERS)
def test_the_best_is_as_good_as_any_that_could_be_kept(answers: list[ScoredText]) -> None:
    best, _ = pick(answers, settings_of("best"))
    whole = [one.reward for one in answers if one.finished and one.text in "abc"]
    assert [one.reward for one in best] == sorted(whole, reverse=True)[:1]


@given(ANSWERS)
def test_of_all_no_text_is_kept_twice_and_none_is_lost(answers: list[ScoredText]) -> None:
    kept = [one.text for one in pick(answers, settings_of("all", min_reward=-1))[0]]
    assert sorted(kept) == sorted({one.text for one in answers if one.finished and one.text in "abc"})


def test_of_equals_the_first_is_the_best() -> None:
    answers = of(0.0, 1.0, 1.0)
    assert pick(answers, settings_of()) == ([answers[1]], {"not the best": 2})


def test_all_that_reach_the_reward_are_kept_each_text_once() -> None:
    answers = [*of(0.5, 1.0, 0.4), ScoredText("answer 1", True, 1.0)]
    kept, dropped = pick(answers, settings_of("all", min_reward=0.5))
    assert kept == answers[:2]
    assert dropped == {"below min_reward": 1, "said before": 1}


@pytest.mark.parametrize("keep", ["all", "best"])
def test_what_was_cut_off_is_kept_only_where_that_is_asked_for(keep: str) -> None:
    answers = [*of(1.0, finished=False), *of(0.5)]
    kept, dropped = pick(answers, settings_of(keep, min_reward=0.5))
    assert kept == answers[1:]
    assert dropped == {"cut off at max_new_tokens": 1}
    assert pick(answers, settings_of(keep, min_reward=0.5, keep_truncated=True))[0] == answers[:1]


def test_what_cannot_be_read_again_is_dropped() -> None:
    answers = [ScoredText(text, True, 1.0) for text in ("", " \n", "a\0b", "\ud800", "fine")]
    assert pick(answers, settings_of()) == (answers[4:], {"empty or unreadable": 4})
