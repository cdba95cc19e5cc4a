"""The fused norm and the fused gate are their plain formulas, in value and in gradient."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from luthier.kernels.gate import GATES, gated
from luthier.kernels.norm import rms_norm

EPS = 1e-5
PLAIN = {"silu": silu, "gelu_pytorch_tanh": lambda x: gelu(x, approximate="tanh")}


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("size", [1.0, 1e-3], ids=["usual", "near_eps"])
def test_the_norm_and_its_gradients_equal_the_formula_in_float64(size: float) -> None:
    x, weight = leaves((2, 5, 8), (8,))
    uneven = torch.arange(80.0, dtype=torch.float64).view(2, 5, 8)
    ours, plain = rms_norm(x * size, weight, eps=EPS), plain_norm(x * size, weight)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
    for one, other in zip(*(torch.autograd.grad((y * uneven).sum(), (x, weight)) for y in (ours, plain)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("trained", [(0,), (1,), (0, 1)], ids=["x", "weight", "both"])
def test_gradients_of_the_norm_agree_with_finite_differences(trained: tuple[int, ...]) -> None:
    inputs = [t.requires_grad_(i in trained) for i, t in enumerate(leaves((6, 8), (8,)))]
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, eps=EPS), inputs)


def test_a_bfloat16_norm_is_computed_in_float32_and_rounded_once() -> None:
    """One rounding of the result is at most half of 2^-7 of it; float32 errors before it are far below."""
    x, weight = (t.detach() for t in leaves((64, 96), (96,), dtype=torch.bfloat16))
    ours = rms_norm(x, weight, eps=EPS)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), plain_norm(x.double(), weight.double()), rtol=2**-8 + 1e-5, atol=0)


@pytest.mark.parametrize("activation", sorted(GATES))
def test_the_gate_and_its_gradients_equal_the_formula_in_float64(activation: str) -> None:
    gate, up = leaves((5, 9), (5, 9))
    ours, plain = gated(gate * 3, up, activation=activation), PLAIN[activation](gate * 3) * up
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), (gate, up)) for y in (ours, plain)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("activation", sorted(GATES))
def test_gradients_of_the_gate_agree_with_finite_differences(activation: str) -> None:
    assert torch.autograd.gradcheck(lambda g, u: gated(g, u, activation=activation), leaves((4, 6), (4, 6)))


@pytest.mark.parametrize("activation", sorted(GATES))
def test_the_gate_leaves_its_inputs_as_they_are(activation: str) -> None:
    gate, up = leaves((4, 6), (4, 6))
    before = gate.detach().clone(), up.detach().clone()
    gated(gate, up, activation=activation).sum().backward()
    assert torch.equal(gate, before[0])
    assert torch.equal(up, before[1])
