"""A linear layer in eight bits is the product of its rounded factors, forward and backward."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from luthier.kernels.float8 import E4M3, E5M2, AmaxWindows, Float8, codes_of, scale_for
from luthier.kernels.float8_linear import device_product, float8_linear, scaled_product
from luthier.kernels.norm import rms_norm


class Case(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    grad: Tensor


def case(*, rows: int = 24, dtype: torch.dtype = torch.float32, trained: bool = True) -> Case:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, grad = (
        torch.randn(shape, generator=generator).mul_(size).to(dtype)
        for shape, size in (((rows, 40), 3.0), ((56, 40), 0.05), ((56,), 1.0), ((rows, 56), 1e-4))
    )
    return Case(x.requires_grad_(), weight.requires_grad_(trained), bias.requires_grad_(trained), grad)


def in_float64(tensor: Tensor, form: torch.dtype) -> Tensor:
    """The numbers that a tensor becomes by its own scale."""
    scale = scale_for(tensor.detach().abs().amax().float(), form)
    return codes_of(tensor.detach(), scale, form).double() / scale.double()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2**-24), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("rows", [1, 24, 200])
def test_product_and_gradients_are_those_of_the_rounded_factors(rows: int, dtype: torch.dtype, bound: float) -> None:
    """Against float64. A sum of n products of codes, each exact, is off by n roundings of float32 of the sum of their
    sizes; the scales add three, the bias one. In bfloat16 the result is rounded once more.
    """
    of, windows = case(rows=rows, dtype=dtype), AmaxWindows(length=1, delayed=False)
    float8_linear(of.x, of.weight, of.bias, windows).backward(of.grad)
    x, weight, grad = in_float64(of.x, E4M3), in_float64(of.weight, E4M3), in_float64(of.grad, E5M2)
    y = float8_linear(of.x, of.weight, of.bias, windows)
    triples = [(y, x, weight, of.bias.double()), (of.x.grad, grad, weight.T, None), (of.weight.grad, grad.T, x.T, None)]
    for found, a, b, bias in triples:
        assert found is not None
        sizes = a.abs() @ b.abs().T + (0 if bias is None else bias.abs())
        allowed = (a.shape[1] + 4) * 2**-24 * sizes + bound * sizes
        assert ((found.double() - (a @ b.T + (0 if bias is None else bias))).abs() <= allowed).all()
    assert torch.equal(of.bias.grad, of.grad.sum(0))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2**-23), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
def test_what_it_is_added_to_is_part_of_what_is_rounded(dtype: torch.dtype, bound: float, bias: bool) -> None:
    """Once, in the type of the input; all gradients are as without, and that of the addend is the output's."""
    of, windows = case(dtype=dtype), AmaxWindows(length=1, delayed=False)
    added, own = torch.randn_like(of.grad).mul_(0.01).requires_grad_(), of.bias if bias else None
    inputs = [of.x, of.weight, *([of.bias] if bias else [])]
    wide = float8_linear(of.x.float(), of.weight.float(), None if own is None else own.float(), windows)
    expected = torch.autograd.grad(float8_linear(of.x, of.weight, own, windows), inputs, of.grad)
    found = float8_linear(of.x, of.weight, own, windows, onto=added * 1)
    exact = wide.double() + added.double()
    assert ((found.double() - exact).abs() <= bound * exact.abs() + 1e-6 * exact.abs().max()).all()
    of_added, *others = torch.autograd.grad(found, [added, *inputs], of.grad)
    assert torch.equal(of_added, of.grad)
    assert all(map(torch.equal, others, expected))


def test_a_frozen_layer_gives_the_same_gradient_to_its_input_and_keeps_nothing_of_it() -> None:
    found = []
    for trained in (True, False):
        of, windows = case(trained=trained), AmaxWindows(length=4)
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            y = float8_linear(of.x, of.weight, of.bias, windows)
        y.backward(of.grad)
        found.append(of.x.grad)
        assert (of.x.numel() in kept) == trained
        assert (of.weight.grad is not None) == trained
    assert torch.equal(*found)


def test_an_input_that_can_be_formed_again_is_not_kept_and_changes_nothing() -> None:
    of, scale = case(), torch.ones(40)
    for normed in (rms_norm(of.x, scale, eps=1e-6), rms_norm(of.x, scale, eps=1e-6).clone()):
        of.weight.grad, earlier = None, of.weight.grad
        float8_linear(normed, of.weight, None, AmaxWindows(length=1, delayed=False)).backward(of.grad)
    assert torch.equal(earlier, of.weight.grad)


@pytest.mark.parametrize("first", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(16, 32, 48), (5, 40, 17), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_products_that_devices_have_are_the_emulated_one(
    shape: tuple[int, int, int], first: torch.dtype, dtype: torch.dtype
) -> None:
    """PyTorch's own scaled product, here the CPU's, to the order of summation: so form, transposes and what is made up
    to multiples of 16 are right.
    """
    rows, inner, columns = shape
    torch.manual_seed(0)
    scales = torch.tensor(300.0), torch.tensor(7.0)
    a = Float8(torch.randn(inner, rows).mul(90).to(first), scales[0]).T
    b = Float8(torch.randn(columns, inner).mul(90).to(E4M3), scales[1])
    found, expected = device_product(a, b, dtype), scaled_product(a, b, dtype)
    bound = (inner + 3) * 2**-24 + (2**-8 if dtype == torch.bfloat16 else 0)
    assert (found.shape, found.dtype, found._is_view()) == (expected.shape, dtype, False)
    assert ((found - expected).abs().double() <= bound * (a.dense().abs() @ b.dense().abs().T).double()).all()


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_is_passed_on_as_such(broken: float) -> None:
    of, windows = case(), AmaxWindows(length=2)
    of.grad[3, 5] = broken
    windows.begin()
    float8_linear(of.x, of.weight, of.bias, windows).backward(of.grad)
    windows.end()
    assert of.x.grad.isnan().all()
    assert of.weight.grad.isnan().all()
    assert windows.seen[2].tolist() == [0.0, 0.0]
    assert (windows.seen[:2, 0] > 0).all()


def test_evaluating_notes_nothing() -> None:
    of, windows = case(), AmaxWindows(length=2)
    with torch.no_grad():
        float8_linear(of.x, of.weight, of.bias, windows)
    windows.eval()
    float8_linear(of.x, of.weight, of.bias, windows).backward(of.grad)
    assert not windows.amax.any()
    assert not windows.counts.any()


@pytest.mark.parametrize("shape", [(2, 3, 40), (0, 40), (40,)])
def test_any_shape_of_rows_is_taken(shape: tuple[int, ...]) -> None:
    of = case()
    y = float8_linear(torch.ones(shape), of.weight, of.bias, AmaxWindows(length=2))
    assert y.shape == (*shape[:-1], 56)


def test_it_runs_on_tensors_without_values() -> None:
    with FakeTensorMode():
        x, weight = torch.empty(8, 16, requires_grad=True), torch.empty(4, 16, requires_grad=True)
        float8_linear(x, weight, None, AmaxWindows(length=2)).sum().backward()
        assert x.grad is not None
        assert weight.grad is not None
        assert (x.grad.shape, weight.grad.shape) == (x.shape, weight.shape)
