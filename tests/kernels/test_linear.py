"""The fast linear layer is PyTorch's, in value and in gradient, and takes only what its library can do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from luthier.kernels.linear import SMALLEST_ROWS, linear, linear_onto, product


def inputs(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x: [rows, 24], weight: [40, 24], bias: [40]."""
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (torch.randn(*s, generator=generator).to(dtype) for s in ((rows, 24), (40, 24), (40,)))
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


@given(rows=st.integers(1, 70), with_bias=st.booleans())
def test_values_and_gradients_are_those_of_float64(rows: int, with_bias: bool) -> None:
    """To 1e-5: sums of at most 70 products of numbers near 1 in float32."""
    ours = inputs(rows)
    exact = [t.detach().double().requires_grad_() for t in ours]
    result = linear(*ours[:2], ours[2] if with_bias else None)
    expected = torch.nn.functional.linear(*exact[:2], exact[2] if with_bias else None)
    result.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(ours[: 2 + with_bias], exact, strict=False):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-5, atol=1e-5 * float(other.grad.abs().max()))


def test_leading_dimensions_are_kept() -> None:
    x, weight, _ = inputs(60)
    assert torch.equal(linear(x.view(3, 4, 5, 24), weight), linear(x, weight).view(3, 4, 5, 40))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_types_take_pytorchs_own_way_bit_for_bit(dtype: torch.dtype) -> None:
    x, weight, bias = inputs(64, dtype)
    assert torch.equal(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    assert torch.equal(product(x, weight), x @ weight.T)


@pytest.mark.parametrize("rows", [SMALLEST_ROWS - 1, SMALLEST_ROWS, 64])
def test_a_product_may_be_read_along_either_dimension(rows: int) -> None:
    """As a backward pass needs it: x W^T, g W, and n^T x."""
    x, weight, _ = (t.detach() for t in inputs(rows))
    grad = torch.ones(rows, 40)
    torch.testing.assert_close(product(grad, weight.T), grad @ weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(product(x.T, grad.T), x.T @ grad, rtol=1e-5, atol=1e-5)


def test_a_frozen_layer_keeps_no_input_for_the_backward_pass() -> None:
    x, weight, bias = inputs(32)
    frozen = linear(x, weight.detach(), bias.detach())
    assert frozen.grad_fn is not None
    (kept,) = frozen.grad_fn.saved_tensors  # type: ignore[attr-defined]
    assert kept.data_ptr() == weight.data_ptr()


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    x, weight, _ = inputs(32)
    (first,) = torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_weight_that_lies_in_a_wider_one_gives_the_same() -> None:
    """Its rows have gaps between them; to 1e-5, and exactly what a copy without gaps gives."""
    x, wide = torch.randn(64, 24, generator=torch.Generator().manual_seed(0)), inputs(40)[1].detach()
    wide = torch.cat([wide, wide], dim=1).requires_grad_()
    found, expected = linear(x, wide[:, :24]), linear(x, wide[:, :24].contiguous())
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), wide)[0] for y in (found, expected)))


def test_a_product_over_nothing_is_zero() -> None:
    """As the gradient of a weight that no token met."""
    assert torch.equal(product(torch.ones(24, 0), torch.ones(40, 0)), torch.zeros(24, 40))
    assert product(torch.ones(0, 24), torch.ones(40, 24)).shape == (0, 40)


@given(rows=st.integers(1, 70), with_bias=st.booleans())
def test_a_product_added_to_something_is_the_sum_in_value_and_gradient(rows: int, with_bias: bool) -> None:
    x, weight, bias = (t.detach().double().requires_grad_() for t in inputs(rows))
    onto = torch.randn(rows, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    given_bias = bias if with_bias else None
    found = linear_onto(onto * 1, x, weight, given_bias)
    expected = onto + torch.nn.functional.linear(x, weight, given_bias)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    learned = (onto, x, weight, bias)[: 3 + with_bias]
    pairs = zip(*(torch.autograd.grad(y.square().sum(), learned) for y in (found, expected)), strict=True)
    for ours, plain in pairs:
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_product_added_to_something_is_rounded_once(dtype: torch.dtype) -> None:
    """Half a unit in the last place of the exact sum, up to the order of sums in float32; written where it was."""
    x, weight, _ = (t.detach() for t in inputs(64, dtype))
    onto = torch.randn(64, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = onto.double() + x.double() @ weight.double().T
    found = linear_onto(onto, x, weight)
    assert found.data_ptr() == onto.data_ptr()
    half = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(found.double(), exact, rtol=half * 1.001, atol=1e-5)
