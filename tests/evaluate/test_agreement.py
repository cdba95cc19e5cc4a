"""Agreement with people, by hand."""

from math import isnan

import pytest

from luthier.evaluate.agreement import Agreement, agreement
from luthier.evaluate.verdicts import Outcome, Verdict
from luthier.rollout.scoring import Failure


def test_kappa_takes_out_what_chance_would_agree_on() -> None:
    """Both say first 20 times, second 15 times; 5 times the judge says first and people second, 10 times the reverse.

    p_o = 35 / 50 = 0.7; the judge says first 25 times, people 30 times: p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5;
    kappa = 0.2 / 0.5 = 0.4.
    """
    said: list[tuple[Outcome, Outcome, int]] = [
        ("first", "first", 20),
        ("first", "second", 5),
        ("second", "first", 10),
        ("second", "second", 15),
    ]
    verdicts = [Verdict(ours) for ours, _, times in said for _ in range(times)]
    labels = [theirs for _, theirs, times in said for _ in range(times)]
    assert agreement(verdicts, labels) == Agreement(50, 0, 0.7, pytest.approx(0.4))


def test_kappa_counts_ties_as_a_word_of_their_own_and_leaves_failures_out() -> None:
    """p_o = 2 / 3; p_e: first 2/3 * 1/3, tie 1/3 * 1/3, second 0 * 1/3, so 1 / 3; kappa = 1 / 2."""
    failed = Verdict("failed", Failure("timed out"))
    verdicts = [Verdict("first"), Verdict("tie"), failed, Verdict("first")]
    found = agreement(verdicts, ["first", "tie", "first", "second"])
    assert found == Agreement(3, 1, pytest.approx(2 / 3), pytest.approx(0.5))


def test_what_cannot_be_said_is_nan() -> None:
    nothing = agreement([Verdict("failed", Failure("timed out"))], ["tie"])
    assert (nothing.num_compared, nothing.num_failed, isnan(nothing.rate), isnan(nothing.kappa)) == (0, 1, True, True)
    alike = agreement([Verdict("first")] * 3, ["first"] * 3)
    assert (alike.rate, isnan(alike.kappa)) == (1.0, True)


def test_there_is_a_label_for_each_verdict() -> None:
    with pytest.raises(ValueError, match="longer"):
        agreement([Verdict("first")], ["first", "tie"])
