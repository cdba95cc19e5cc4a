"""Eight-bit floats are rounded as their formats say, and scales follow the greatest entries of a window."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from hypothesis.extra.numpy import arrays

from luthier.kernels.float8 import E4M3, E5M2, AmaxWindow, quantized, scale_for

FORMS = st.sampled_from([E4M3, E5M2])
NUMBERS = st.floats(-1e6, 1e6, width=32)
BITS = {E4M3: (3, -6, 448.0), E5M2: (2, -14, 57344.0)}  # of the mantissa, the smallest exponent, the greatest number


def rounded(value: float, form: torch.dtype) -> float:
    """By the definition of the format (Micikevicius et al. 2022, table 1), saturating; ties go to even."""
    mantissa, smallest, greatest = BITS[form]
    exponent = max(math.frexp(value)[1] - 1, smallest)
    step = 2.0 ** (exponent - mantissa)
    return max(-greatest, min(greatest, round(value / step) * step))


@given(st.floats(-1e5, 1e5, width=32), FORMS)
def test_a_number_becomes_the_nearest_of_its_format(value: float, form: torch.dtype) -> None:
    assert float(quantized(torch.tensor(value), 1.0, form)) == rounded(value, form)


@given(arrays("float32", 20, elements=NUMBERS), FORMS)
def test_nothing_moves_further_than_half_a_step(values, form: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    """Half a step of the number's own size, or of the smallest numbers of the format; and float32's own rounding."""
    tensor = torch.from_numpy(values)
    scale = scale_for(float(tensor.abs().max()), form)
    mantissa, smallest, _ = BITS[form]
    allowed = (tensor.abs() * 2.0 ** -(mantissa + 1)).clamp_min(2.0 ** (smallest - mantissa - 1) / scale)
    assert ((quantized(tensor, scale, form) - tensor).abs() <= allowed * (1 + 1e-5)).all()


@given(st.floats(2.0**-60, 2.0**60), FORMS)
def test_the_scale_moves_the_greatest_entry_to_the_formats_greatest(amax: float, form: torch.dtype) -> None:
    assert scale_for(amax, form) * amax == pytest.approx(torch.finfo(form).max)


@pytest.mark.parametrize("amax", [0.0, math.inf, math.nan, 1e-44])
def test_where_there_is_nothing_to_go_by_the_scale_is_one(amax: float) -> None:
    assert scale_for(amax, E4M3) == 1.0


@given(st.lists(st.floats(2.0**-20, 2.0**20, width=32), min_size=1, max_size=30), st.integers(1, 6), FORMS)
def test_a_delayed_scale_follows_the_window_before(peaks: list[float], length: int, form: torch.dtype) -> None:
    window = AmaxWindow(form, length=length)
    for step, peak in enumerate(peaks):
        before = max(peaks[max(0, step - length) : step], default=peak)
        values = torch.tensor([peak, -peak / 3])
        assert torch.equal(window.quantize(values), quantized(values, scale_for(before, form), form))
    assert window.scale == scale_for(max(peaks[-length:]), form)


@given(st.lists(st.floats(2.0**-20, 2.0**20, width=32), min_size=1, max_size=9), FORMS)
def test_a_current_scale_follows_the_tensor_at_hand(peaks: list[float], form: torch.dtype) -> None:
    window = AmaxWindow(form, delayed=False)
    for peak in peaks:
        assert float(window.quantize(torch.tensor([peak, 0.0]))[0]) == pytest.approx(peak, rel=1e-6)


def test_what_outgrows_a_delayed_scale_is_cut_off_once_and_then_fits() -> None:
    window = AmaxWindow(E4M3)
    window.quantize(torch.tensor([1.0]))
    assert [float(window.quantize(torch.tensor([16.0]))) for _ in range(2)] == [1.0, 16.0]


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_an_overflow_does_not_stay_in_the_window(broken: float) -> None:
    window = AmaxWindow(E5M2, length=4)
    window.quantize(torch.tensor([3.0]))
    window.quantize(torch.tensor([broken, 1.0]))
    assert list(window.seen) == [3.0]
    assert float(window.quantize(torch.tensor([3.0]))) == 3.0
