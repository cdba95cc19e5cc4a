"""A win rate lies within its interval, which is Wilson's; a fall of an accuracy has the error of paired differences."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.evaluate.significance import WinRate, fall_between, wilson_interval, win_rate
from luthier.evaluate.verdicts import Outcome, Verdict

counts = st.integers(0, 300)


def verdicts(**numbers: int) -> list[Verdict]:
    words: dict[str, Outcome] = {"wins": "first", "ties": "tie", "losses": "second", "failed": "failed"}
    return [Verdict(words[name]) for name, number in numbers.items() for _ in range(number)]


def test_the_interval_is_wilsons() -> None:
    """8 of 10 at z = 1.959964: middle (0.8 + 0.192073) / 1.384146 = 0.716740,
    reach 1.959964 sqrt(0.016 + 0.0096036) / 1.384146 = 0.226578.
    """
    low, high = wilson_interval(8, 10)
    assert (low, high) == (pytest.approx(0.490162, abs=1e-6), pytest.approx(0.943318, abs=1e-6))


def test_a_tie_is_half_a_win_and_a_failure_is_nothing() -> None:
    found = win_rate(verdicts(wins=5, ties=4, losses=1, failed=7))
    low, high = wilson_interval(7, 10)
    assert found == WinRate(5, 4, 1, 0.7, low, high)
    assert str(win_rate(verdicts(wins=8, losses=2))) == "80.0% (49.0 to 94.3), 8 wins, 0 ties, 2 losses"


def test_without_any_verdict_nothing_is_known() -> None:
    assert win_rate(verdicts(failed=3)) == WinRate(0, 0, 0, 0.5, 0.0, 1.0)


@given(counts, counts, counts, st.floats(0.5, 0.999))
def test_the_rate_lies_within_its_bounds(wins: int, ties: int, losses: int, confidence: float) -> None:
    found = win_rate(verdicts(wins=wins, ties=ties, losses=losses), confidence=confidence)
    assert 0 <= found.low <= found.rate <= found.high <= 1


@given(counts, counts, counts)
def test_seen_from_the_other_side_the_rate_is_its_complement(wins: int, ties: int, losses: int) -> None:
    one, other = (win_rate(verdicts(wins=a, ties=ties, losses=b)) for a, b in ((wins, losses), (losses, wins)))
    assert (one.rate, one.low, one.high) == pytest.approx((1 - other.rate, 1 - other.high, 1 - other.low), abs=1e-12)


@given(counts.filter(bool), counts)
def test_more_verdicts_make_it_surer(wins: int, losses: int) -> None:
    few, many = (win_rate(verdicts(wins=n * wins, losses=n * losses)) for n in (1, 2))
    assert many.high - many.low < few.high - few.low


def test_a_fall_within_two_standard_errors_is_none() -> None:
    """Four lost of 100 and none won: 0.04, with sqrt(4 - 0.16) / 100 = 0.0196; three of four within chance."""
    before = [True] * 60 + [False] * 40
    lost = [False] * 4 + before[4:]
    found = fall_between(before, lost)
    assert (found.fall, found.error) == (pytest.approx(0.04), pytest.approx(0.019596, rel=1e-4))
    assert found.is_over(0.02)
    assert not found.is_over(0.05)
    traded = [*lost[:97], True, True, True]
    assert fall_between(before, traded).fall == pytest.approx(0.01)
    assert not fall_between(before, traded).is_over(0.0)
    assert not fall_between(before, before).is_over(0.0)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
def test_the_error_of_a_fall_is_that_of_the_paired_differences(pairs: list[tuple[bool, bool]]) -> None:
    """The standard error of a mean of n differences of -1, 0 and 1, with n and not n - 1 below."""
    before, after = zip(*pairs, strict=True)
    differences = [was - now for was, now in pairs]
    found = fall_between(before, after)
    assert found.fall == pytest.approx(statistics.fmean(differences))
    assert found.error == pytest.approx(statistics.pstdev(differences) / math.sqrt(len(pairs)))
