"""INT8 has bitsandbytes' numbers bit for bit, and keeps the laws of a quantizer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from luthier.quant.int8 import INT8

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


WEIGHTS = {
    "one part": normal(96, 130),
    "several parts": normal(1030, 1024),
    "rows of zeros": normal(6, 10) * torch.tensor([[0.0], [1], [0], [1e-3], [100], [0]]),
    "ties": normal(64, 128).mul(8).round().clamp(-127, 127) / 2,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_codes_scales_and_values_are_those_of_bitsandbytes(name: str, dtype: torch.dtype) -> None:
    reason = "bitsandbytes 0.50 is not installed: its numbers cannot be compared with"
    theirs = pytest.importorskip("bitsandbytes", minversion="0.50", reason=reason).functional
    weight = WEIGHTS[name].to(dtype)
    codes, absmax, _ = theirs.int8_vectorwise_quant(weight)
    ours = INT8.of(weight)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.absmax, absmax)
    assert torch.equal(ours.dense(weight.shape, torch.float32), theirs.int8_vectorwise_dequant(codes, absmax))


@given(size=SIZES, seed=st.integers(0, 99))
def test_what_was_dequantized_quantizes_to_itself(size: tuple[int, int], seed: int) -> None:
    """Codes exactly; scales to two roundings of float32, since 127 * (s / 127) is not always s."""
    once = INT8.of(normal(*size, seed=seed))
    again = INT8.of(once.dense(once.codes.shape, torch.float32))
    assert torch.equal(again.codes, once.codes)
    torch.testing.assert_close(again.absmax, once.absmax, rtol=2**-22, atol=0)


@given(size=SIZES, seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES))
def test_a_weight_moves_by_half_a_step_of_its_row_at_most(size: tuple[int, int], seed: int, dtype: torch.dtype) -> None:
    """A step is the row's largest / 127; to half of one come the roundings of float32, 1e-6 of the largest."""
    weight = normal(*size, seed=seed, dtype=dtype)
    stored = INT8.of(weight)
    error = (stored.dense(weight.shape, torch.float32) - weight.float()).abs()
    assert bool((error <= (0.5 / 127 + 1e-6) * stored.absmax[:, None]).all())


@given(size=SIZES, seed=st.integers(0, 99), exponent=st.integers(-20, 20))
def test_a_power_of_two_passes_through(size: tuple[int, int], seed: int, exponent: int) -> None:
    weight, factor = normal(*size, seed=seed), 2.0**exponent
    one, other = INT8.of(weight), INT8.of(weight * factor)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.absmax * factor, other.absmax)


def test_a_row_too_small_to_divide_by_becomes_zero() -> None:
    weight = torch.tensor([[1e-39, -1e-39], [1.0, -0.5]])
    assert INT8.of(weight).codes.tolist() == [[0, 0], [127, -64]]


def test_a_weight_takes_little_over_eight_bits() -> None:
    stored = INT8.of(normal(256, 128))
    assert sum(t.nbytes for t in stored) == 256 * 128 + 256 * 4
