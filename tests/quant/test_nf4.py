"""NF4 has bitsandbytes' numbers bit for bit, and keeps the laws of a quantizer at every size."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from luthier.quant.nf4 import LEVELS, NF4, compress_scales, dequantize_blocks, expand_scales, quantize_blocks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_GAP = max(b - a for a, b in pairwise(LEVELS))
SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))


@pytest.fixture(scope="module")
def bitsandbytes() -> object:
    reason = "bitsandbytes 0.50 is not installed: its numbers cannot be compared with"
    return pytest.importorskip("bitsandbytes", minversion="0.50", reason=reason).functional


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def uneven() -> Tensor:
    """Rows from 1e-3 to 100, 2% of the entries there and all others zero: blocks of zeros, far-off scales."""
    return normal(96, 130) * torch.logspace(-3, 2, 96)[:, None] * (normal(96, 130, seed=1) > 2)


def multiples_of_an_eighth() -> Tensor:
    """The few values that exact halves of a block's largest weight give: ties, if anything does."""
    return normal(64, 128).mul(8).round().clamp(-8, 8) / 8


WEIGHTS = {
    "full blocks": normal(96, 128),
    "a last block of 6": normal(7, 10),
    "one block": normal(2, 30),
    "several parts": normal(1030, 1024),
    "a second scale of a few": normal(130, 128),
    "zeros": torch.zeros(4, 64),
    "uneven": uneven(),
    "ties": multiples_of_an_eighth(),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_codes_scales_and_values_are_those_of_bitsandbytes(bitsandbytes: object, name: str, dtype: torch.dtype) -> None:
    weight = WEIGHTS[name].to(dtype)
    packed, state = bitsandbytes.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    ours = NF4.of(weight)
    assert torch.equal(ours.codes, packed.flatten())
    assert torch.equal(ours.scale_codes, state.absmax)
    assert torch.equal(ours.absmax, state.state2.absmax)
    assert torch.equal(ours.offset, state.offset)
    assert torch.equal(ours.dense(weight.shape, dtype), bitsandbytes.dequantize_4bit(packed, state))


@given(size=SIZES, seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES))
def test_codes_and_scales_of_any_size_are_those_of_bitsandbytes(
    bitsandbytes: object, size: tuple[int, int], seed: int, dtype: torch.dtype
) -> None:
    weight = normal(*size, seed=seed, dtype=dtype)
    packed, state = bitsandbytes.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    theirs = (packed.flatten(), state.absmax, state.state2.absmax, state.offset)
    assert all(torch.equal(a, b) for a, b in zip(NF4.of(weight), theirs, strict=True))


def test_levels_are_quantiles_of_the_normal_distribution() -> None:
    """Outermost at 1 - (1/32 + 1/30) / 2, the mean of what 16 and 15 levels ask for; to 2e-7, two float32 roundings."""
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    upper = torch.special.ndtri(torch.linspace(outermost, 0.5, 9, dtype=torch.float64))
    lower = torch.special.ndtri(torch.linspace(outermost, 0.5, 8, dtype=torch.float64))
    expected = torch.cat((-lower, upper[:-1].flip(0))) / upper[0]
    torch.testing.assert_close(torch.tensor(LEVELS, dtype=torch.float64), expected, rtol=0, atol=2e-7)


@given(size=SIZES, seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES))
def test_shape_and_type_are_kept(size: tuple[int, int], seed: int, dtype: torch.dtype) -> None:
    weight = normal(*size, seed=seed, dtype=dtype)
    dense = NF4.of(weight).dense(weight.shape, dtype)
    assert (dense.shape, dense.dtype, dense.is_contiguous()) == (weight.shape, dtype, True)


@given(size=SIZES, seed=st.integers(0, 99))
def test_what_was_dequantized_quantizes_to_itself(size: tuple[int, int], seed: int) -> None:
    weight = normal(*size, seed=seed)
    codes, scales = quantize_blocks(weight)
    again = quantize_blocks(dequantize_blocks(codes, scales, weight.shape, weight.dtype))
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scales)


@given(size=SIZES, seed=st.integers(0, 99))
def test_a_weight_moves_by_half_the_largest_gap_of_its_block_at_most(size: tuple[int, int], seed: int) -> None:
    """1e-6 of the scale beside it, for the roundings of float32."""
    weight = normal(*size, seed=seed)
    codes, scales = quantize_blocks(weight)
    error = (dequantize_blocks(codes, scales, weight.shape, weight.dtype) - weight).abs().flatten()
    assert bool((error <= (LARGEST_GAP / 2 + 1e-6) * scales.repeat_interleave(64)[: error.numel()]).all())


@given(num_scales=st.integers(1, 700), seed=st.integers(0, 99))
def test_a_scale_moves_by_half_the_largest_gap_of_the_dynamic_map_at_most(num_scales: int, seed: int) -> None:
    """Values next to 1 lie 0.9 / 64 apart; to half of that come half a step of the grid, 1.6e-5, and roundings."""
    scales = normal(num_scales, seed=seed).abs()
    codes, absmax, offset = compress_scales(scales)
    error = (expand_scales(codes, absmax, offset) - scales).abs()
    bound = (0.9 / 64 / 2 + 1.7e-5) * absmax.repeat_interleave(256)[:num_scales] + 1e-6 * offset
    assert bool((error <= bound).all())


@given(size=SIZES, seed=st.integers(0, 99), exponent=st.integers(-20, 20))
def test_a_power_of_two_passes_through(size: tuple[int, int], seed: int, exponent: int) -> None:
    weight, factor = normal(*size, seed=seed), 2.0**exponent
    one, other = NF4.of(weight), NF4.of(weight * factor)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scale_codes, other.scale_codes)
    scaled = one.dense(weight.shape, weight.dtype) * factor
    assert torch.equal(scaled, other.dense(weight.shape, weight.dtype))


def test_a_weight_takes_little_over_four_bits() -> None:
    """4 for its code, 8/64 for its block's scale, 32/(64 * 256) for that scale's, and one offset of 32 bits."""
    weight = normal(256, 256)
    stored_bytes = sum(t.nbytes for t in NF4.of(weight))
    assert stored_bytes * 8 == weight.numel() * (4 + 8 / 64 + 32 / (64 * 256)) + 32
