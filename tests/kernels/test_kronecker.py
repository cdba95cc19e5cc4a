"""The update by a Kronecker product is the plain formula, in value and in gradient."""

import pytest
import torch
from torch import Tensor

from luthier.kernels.kronecker import add_kronecker, add_kronecker_plain

TOKENS, SCALE = 11, 0.7
SIZES = pytest.mark.parametrize("sizes", [(3, 4, 5, 2), (4, 2, 3, 6), (1, 1, 7, 5)], ids=str)  # l, m, k, n


def leaves(sizes: tuple[int, ...], dtype: torch.dtype, factors: torch.dtype) -> list[Tensor]:
    """output, x, C, D."""
    num_left, m, k, n = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = ((TOKENS, num_left * k), (TOKENS, m * n), (num_left, m), (k, n))
    made = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [t.to(dtype if i < 2 else factors).requires_grad_() for i, t in enumerate(made)]


@SIZES
def test_the_update_and_its_gradients_equal_the_formula_in_float64(sizes: tuple[int, ...]) -> None:
    ours, plain = (leaves(sizes, torch.float64, torch.float64) for _ in range(2))
    updated = add_kronecker(ours[0] * 1, *ours[1:], SCALE)
    expected = add_kronecker_plain(*plain, SCALE)
    torch.testing.assert_close(updated, expected, rtol=0, atol=1e-12)
    updated.square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-10)


def test_a_wide_float32_update_equals_the_formula_in_float64() -> None:
    """To 1e-5 of the largest, at sizes that oneDNN takes; a plain sum sends back a gradient that steps by nothing."""
    ours = leaves((8, 6, 12, 16), torch.float32, torch.float32)
    exact = [t.detach().double().requires_grad_() for t in ours]
    add_kronecker(ours[0] * 1, *ours[1:], SCALE).sum().backward()
    add_kronecker_plain(*exact, SCALE).sum().backward()
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=0, atol=1e-5 * float(other.grad.abs().max()))


@SIZES
def test_float32_factors_beside_bfloat16_activations_get_float32_gradients(sizes: tuple[int, ...]) -> None:
    """Each product rounds to 8 bits, relative 2^-8, three times in a chain: 2% of the largest leaves room for four."""
    ours = leaves(sizes, torch.bfloat16, torch.float32)
    exact = [t.detach().double().requires_grad_() for t in ours]
    add_kronecker(ours[0] * 1, *ours[1:], SCALE).sum().backward()
    add_kronecker_plain(*exact, SCALE).sum().backward()
    assert [t.grad.dtype for t in ours] == [torch.bfloat16] * 2 + [torch.float32] * 2
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=0, atol=0.02 * float(other.grad.abs().max()))


def test_nothing_is_kept_but_the_input_and_the_factors() -> None:
    output, *rest = leaves((3, 4, 5, 2), torch.float32, torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        add_kronecker(output * 1, *rest, SCALE)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in rest}


def test_the_update_is_written_into_the_output_that_was_given() -> None:
    output, *rest = (t.detach() for t in leaves((3, 4, 5, 2), torch.float32, torch.float32))
    assert add_kronecker(output, *rest, SCALE).data_ptr() == output.data_ptr()


def test_an_input_that_needs_no_gradient_leaves_the_factors_theirs() -> None:
    """The first layer of a frozen model: neither its input nor its output asks for a gradient."""
    output, x, c, d = leaves((3, 4, 5, 2), torch.float64, torch.float64)
    ours = torch.autograd.grad(add_kronecker(output.detach().clone(), x.detach(), c, d, SCALE).sum(), (c, d))
    plain = torch.autograd.grad(add_kronecker_plain(output, x, c, d, SCALE).sum(), (c, d))
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_no_tokens_at_all_give_none_and_gradients_of_zero() -> None:
    """As where no row of a batch is assigned to an adapter."""
    inputs = leaves((3, 4, 5, 2), torch.float32, torch.float32)
    output, x, c, d = inputs[0][:0], inputs[1][:0], *inputs[2:]
    updated = add_kronecker(output * 1, x, c, d, SCALE)
    assert updated.shape == (0, 15)
    updated.sum().backward()
    assert not any(t.grad.any() for t in inputs)


@SIZES
def test_without_an_output_there_is_the_update_alone_and_may_be_written_into(sizes: tuple[int, ...]) -> None:
    output, x, c, d = leaves(sizes, torch.float64, torch.float64)
    found = add_kronecker(None, x, c, d, SCALE).mul_(2)
    expected = 2 * add_kronecker_plain(torch.zeros_like(output), x, c, d, SCALE)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for ours, plain in zip(*(torch.autograd.grad(y.square().sum(), (x, c, d)) for y in (found, expected)), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-10)
