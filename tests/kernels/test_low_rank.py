"""The fused low-rank update is the plain formula, in value and in gradient."""

import pytest
import torch
from torch import Tensor

from luthier.kernels.low_rank import add_low_rank, add_low_rank_plain

TOKENS, IN, OUT, RANK, SCALE = 11, 7, 5, 3, 1.7


def leaves(dtype: torch.dtype, factors: torch.dtype) -> list[Tensor]:
    """output, x, A, B."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((TOKENS, OUT), (TOKENS, IN), (RANK, IN), (OUT, RANK))
    made = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [t.to(dtype if i < 2 else factors).requires_grad_() for i, t in enumerate(made)]


def test_the_update_and_its_gradients_equal_the_formula_in_float64() -> None:
    ours, plain = leaves(torch.float64, torch.float64), leaves(torch.float64, torch.float64)
    updated = add_low_rank(ours[0] * 1, *ours[1:], SCALE)
    expected = add_low_rank_plain(*plain, SCALE)
    torch.testing.assert_close(updated, expected, rtol=0, atol=1e-12)
    updated.square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-10)


def test_a_wide_float32_update_equals_the_formula_in_float64() -> None:
    """To 1e-5 of the largest, at sizes that oneDNN takes; a plain sum sends back a gradient that steps by nothing."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((40, 24), (40, 48), (16, 48), (24, 16))
    ours = [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]
    exact = [t.detach().double().requires_grad_() for t in ours]
    add_low_rank(ours[0] * 1, *ours[1:], SCALE).sum().backward()
    add_low_rank_plain(*exact, SCALE).sum().backward()
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=0, atol=1e-5 * float(other.grad.abs().max()))


def test_gradients_agree_with_finite_differences() -> None:
    inputs = leaves(torch.float64, torch.float64)
    assert torch.autograd.gradcheck(lambda y, *rest: add_low_rank(y * 1, *rest, SCALE), inputs)


def test_the_update_is_written_into_the_output_that_was_given() -> None:
    output, *rest = (t.detach() for t in leaves(torch.float32, torch.float32))
    assert add_low_rank(output, *rest, SCALE).data_ptr() == output.data_ptr()


def test_an_input_that_needs_no_gradient_leaves_the_factors_theirs() -> None:
    """The first layer of a frozen model: neither its input nor its output asks for a gradient."""
    output, x, a, b = leaves(torch.float64, torch.float64)
    add_low_rank(output.detach().clone(), x.detach(), a, b, SCALE).sum().backward()
    expected = torch.autograd.grad(add_low_rank_plain(output, x, a, b, SCALE).sum(), (a, b))
    for ours, plain in zip((a.grad, b.grad), expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_float32_factors_beside_bfloat16_activations_get_float32_gradients(scale: float) -> None:
    """Each product rounds to 8 bits, relative 2^-8, twice in a chain: 2% of the largest entry leaves room for four."""
    ours = leaves(torch.bfloat16, torch.float32)
    updated = add_low_rank(ours[0] * 1, *ours[1:], scale)
    updated.sum().backward()
    exact = [t.detach().double().requires_grad_() for t in ours]
    add_low_rank_plain(*exact, scale).sum().backward()
    assert [t.grad.dtype for t in ours] == [torch.bfloat16] * 2 + [torch.float32] * 2
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=0, atol=0.02 * float(other.grad.abs().max()))


def test_two_updates_of_one_output_add_up() -> None:
    output, x, a, b = leaves(torch.float64, torch.float64)
    twice = add_low_rank(add_low_rank(output * 1, x, a, b, 1.0), x, a, b, 0.5)
    once = add_low_rank_plain(output, x, a, b, 1.5)
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-12)
    for ours, plain in zip(*(torch.autograd.grad(y.square().sum(), (x, a, b)) for y in (twice, once)), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-10)


def test_without_an_output_there_is_the_update_alone() -> None:
    output, x, a, b = leaves(torch.float64, torch.float64)
    found, expected = add_low_rank(None, x, a, b, SCALE), add_low_rank_plain(torch.zeros_like(output), x, a, b, SCALE)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for ours, plain in zip(*(torch.autograd.grad(y.square().sum(), (x, a, b)) for y in (found, expected)), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-10)
