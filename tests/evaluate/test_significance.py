"""A win rate lies within its interval, which is Wilson's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.evaluate.significance import WinRate, wilson_interval, win_rate
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
