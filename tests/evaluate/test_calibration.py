"""The calibration error: 0 for a model that knows how sure it may be, and as large as it is too sure."""

from math import log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.evaluate.calibration import calibration_error

SURE_BY_THREE_QUARTERS = log(3)  # s(log 3) = 0.75


def test_a_model_that_is_right_as_often_as_it_says_has_none() -> None:
    assert calibration_error([SURE_BY_THREE_QUARTERS] * 3 + [-SURE_BY_THREE_QUARTERS]) == pytest.approx(0, abs=1e-12)


def test_one_that_is_too_sure_or_too_modest_has_the_gap() -> None:
    assert calibration_error([SURE_BY_THREE_QUARTERS, -SURE_BY_THREE_QUARTERS]) == pytest.approx(0.25)
    assert calibration_error([SURE_BY_THREE_QUARTERS] * 4) == pytest.approx(0.25)
    assert calibration_error([1e6, -1e6]) == pytest.approx(0.5)


def test_bins_do_not_make_good_for_one_another() -> None:
    """Too sure where it is sure, too modest where it is not: on the whole right as often as it says."""
    mixed = [log(9)] * 7 + [-log(9)] * 3 + [log(1.5)] * 8 + [-log(1.5)] * 2  # says 0.9 and 0.6, is right 0.7 and 0.8
    assert calibration_error(mixed) == pytest.approx(0.2)


def test_without_pairs_and_with_ties_there_is_none() -> None:
    assert calibration_error([]) == 0
    assert calibration_error([0.0, 0.0]) == 0


@given(margins=st.lists(st.floats(allow_nan=False), max_size=30))
def test_it_lies_between_0_and_1_and_knows_no_order(margins: list[float]) -> None:
    found = calibration_error(margins)
    assert 0 <= found <= 1
    assert calibration_error(margins[::-1]) == pytest.approx(found)
