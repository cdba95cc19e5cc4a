"""Eight-bit floats are rounded as their formats say, and scales follow the greatest entries of a window."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from hypothesis.extra.numpy import arrays
from torch import Tensor

from luthier.kernels.float8 import E4M3, E5M2, ROLES, AmaxWindows, Float8, codes_of, greatest_of, scale_for

FORMS = st.sampled_from([E4M3, E5M2])
NUMBERS = st.floats(-1e6, 1e6, width=32)
PEAKS = st.floats(2.0**-20, 2.0**20, width=32)
BITS = {E4M3: (3, -6, 448.0), E5M2: (2, -14, 57344.0)}  # of the mantissa, the smallest exponent, the greatest number
ONE = torch.ones(())


def rounded(value: float, form: torch.dtype) -> float:
    """By the definition of the format (Micikevicius et al. 2022, table 1), saturating; ties go to even."""
    mantissa, smallest, greatest = BITS[form]
    exponent = max(math.frexp(value)[1] - 1, smallest)
    step = 2.0 ** (exponent - mantissa)
    return max(-greatest, min(greatest, round(value / step) * step))


def step(windows: AmaxWindows, *tensors: Tensor, role: str = "input") -> list[Tensor]:
    """What the tensors become in one step, as its micro-batches."""
    windows.begin()
    found = [windows.quantize(role, tensor, noted=True).dense() for tensor in tensors]
    windows.end()
    return found


@pytest.mark.parametrize("form", [E4M3, E5M2])
def test_every_code_stands_for_itself_and_between_two_the_nearest_is_taken(form: torch.dtype) -> None:
    """All 256 codes, and the middle between each two neighbours, which goes to the even one, as torch's cast does."""
    numbers = torch.arange(256, dtype=torch.uint8).view(form).float()
    assert torch.equal(codes_of(numbers.nan_to_num(0, 0, 0), ONE, form).float(), numbers.nan_to_num(0, 0, 0))
    ordered = numbers[numbers.isfinite()].unique()
    middles = (ordered[1:] + ordered[:-1]) / 2
    found = codes_of(middles, ONE, form)
    assert torch.equal(found.float(), middles.to(form).float())
    assert (found.view(torch.uint8) % 2 == 0).all()


@given(st.floats(-1e5, 1e5, width=32), FORMS)
def test_a_number_becomes_the_nearest_of_its_format(value: float, form: torch.dtype) -> None:
    assert float(codes_of(torch.tensor(value), ONE, form)) == rounded(value, form)


@given(arrays("float32", 20, elements=NUMBERS), FORMS)
def test_nothing_moves_further_than_half_a_step(values, form: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    """Half a step of the number's own size, or of the smallest numbers of the format; and float32's own rounding."""
    tensor = torch.from_numpy(values)
    scale = scale_for(greatest_of(tensor), form)
    mantissa, smallest, _ = BITS[form]
    allowed = (tensor.abs() * 2.0 ** -(mantissa + 1)).clamp_min(2.0 ** (smallest - mantissa - 1) / float(scale))
    found = Float8(codes_of(tensor, scale, form), scale).dense()
    assert ((found - tensor).abs() <= allowed * (1 + 1e-5)).all()


@given(st.floats(2.0**-60, 2.0**60, width=32), FORMS, st.integers(0, 8))
def test_the_scale_moves_the_greatest_entry_to_the_formats_greatest(
    amax: float, form: torch.dtype, margin: int
) -> None:
    scale = float(scale_for(torch.tensor(amax), form, margin))
    assert scale * amax * 2**margin == pytest.approx(torch.finfo(form).max)


@pytest.mark.parametrize("amax", [0.0, math.inf, math.nan, 1e-44])
def test_where_there_is_nothing_to_go_by_the_scale_is_one(amax: float) -> None:
    assert scale_for(torch.tensor(amax), E4M3) == 1.0


@given(arrays("float32", st.integers(0, 9), elements=NUMBERS))
def test_the_greatest_is_that_of_the_sizes(values) -> None:  # type: ignore[no-untyped-def]
    assert float(greatest_of(torch.from_numpy(values))) == max(map(abs, values.tolist()), default=0.0)
    assert greatest_of(torch.tensor([1.0, math.nan])).isnan()


@given(st.lists(PEAKS, min_size=1, max_size=30), st.integers(1, 6), st.sampled_from(list(ROLES)), st.integers(0, 3))
def test_a_delayed_scale_follows_the_window_before(peaks: list[float], length: int, role: str, margin: int) -> None:
    windows, form = AmaxWindows(length=length, margin=margin), ROLES[role]
    for i, peak in enumerate(peaks):
        before = max(peaks[max(0, i - length) : i], default=peak)
        values, scale = torch.tensor([peak, -peak / 3]), scale_for(torch.tensor(before), form, margin)
        (found,) = step(windows, values, role=role)
        assert torch.equal(found, Float8(codes_of(values, scale, form), scale).dense())
    following = scale_for(torch.tensor(max(peaks[-length:])), form, margin)
    assert windows.scales()[list(ROLES).index(role)] == following


@given(st.lists(PEAKS, min_size=1, max_size=9))
def test_a_current_scale_follows_the_tensor_at_hand(peaks: list[float]) -> None:
    windows = AmaxWindows(length=1, delayed=False)
    for peak in peaks:
        (found,) = step(windows, torch.tensor([peak, 0.0]))
        assert float(found[0]) == pytest.approx(peak, rel=1e-6)
        assert windows.shares_cut_off()[0] == 0


def test_all_micro_batches_of_a_step_have_one_scale_and_the_window_takes_the_greatest() -> None:
    windows = AmaxWindows(length=4)
    step(windows, torch.tensor([1.0]))
    found = step(windows, torch.tensor([2.0]), torch.tensor([8.0]), torch.tensor([0.5]))
    assert torch.cat(found).tolist() == [1.0, 1.0, 0.5]
    assert windows.seen[0].tolist() == [8.0, 1.0, 0.0, 0.0]


def test_quantizing_again_within_a_step_changes_nothing() -> None:
    windows = AmaxWindows(length=4)
    step(windows, torch.tensor([1.0]))
    once, twice = step(windows, torch.tensor([5.0, 0.3]), torch.tensor([5.0, 0.3]))
    assert torch.equal(once, twice)
    assert windows.seen[0].tolist() == [5.0, 1.0, 0.0, 0.0]


def test_what_grows_a_thousandfold_is_cut_off_once_and_counted_and_then_fits() -> None:
    windows = AmaxWindows(length=3)
    step(windows, torch.tensor([1.0, 0.5]))
    assert [float(step(windows, torch.tensor([1024.0, 0.5]))[0][0]) for _ in range(2)] == [1.0, 1024.0]
    windows.begin()
    windows.quantize("input", torch.tensor([1024.0, 1056.0, 1064.0, 0.0]), noted=True)
    assert windows.shares_cut_off().tolist() == [0.25, 0.0, 0.0]  # 448 stands for 1,024 and, rounded, for up to 1,060.6


def test_a_long_quiet_run_forgets_a_spike_after_the_window() -> None:
    windows = AmaxWindows(length=3)
    for peak in (1000.0, *[0.01] * 3):
        step(windows, torch.tensor([peak]))
    assert windows.scales()[0] == scale_for(torch.tensor(0.01), E4M3)


def test_tiny_values_under_a_great_window_become_zero_and_alone_keep_their_bits() -> None:
    """E4M3 has no number between 0 and 2^-9: by a scale of 448, nothing below 2^-10 / 448 is left."""
    windows, tiny = AmaxWindows(length=1), torch.tensor([2e-6, -1e-6])
    step(windows, torch.tensor([1.0]))
    assert step(windows, tiny)[0].abs().tolist() == [0.0, 0.0]
    assert torch.allclose(step(windows, tiny)[0], tiny, rtol=2.0**-4)


@pytest.mark.parametrize("broken", [math.inf, -math.inf, math.nan])
def test_an_overflow_is_no_number_any_more_and_stays_out_of_the_window(broken: float) -> None:
    windows = AmaxWindows(length=4)
    step(windows, torch.tensor([4.0]), role="gradient")
    good, bad = step(windows, torch.tensor([2.0]), torch.tensor([broken, 1.0]), role="gradient")
    assert bad.isnan().all()
    assert good.isfinite().all()
    assert windows.seen[2].tolist() == [4.0, 0.0, 0.0, 0.0]
    assert float(step(windows, torch.tensor([4.0]), role="gradient")[0]) == 4.0


def test_a_step_in_which_a_layer_was_not_run_leaves_its_windows() -> None:
    windows = AmaxWindows(length=2)
    step(windows, torch.tensor([3.0]))
    for _ in range(5):
        step(windows)
    assert windows.seen[0].tolist() == [3.0, 0.0]
