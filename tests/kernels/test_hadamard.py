"""The product of two low-rank updates is the plain formula, in value and in gradient, whichever way it is taken."""

import pytest
import torch
from torch import Tensor

from luthier.kernels.hadamard import add_hadamard, add_hadamard_plain, as_low_rank

TOKENS, IN, OUT, SCALE = 11, 9, 14, 0.7
# Of 11 tokens: 12 * 2^2 * 23 < 15 * 126, and 12 * 5^2 * 23 > 21 * 126; four times the tokens and sizes change neither.
WAYS = pytest.mark.parametrize("r", [2, 5], ids=["thin", "dense"])


def leaves(r: int, dtype: torch.dtype, factors: torch.dtype, *, size: int = 1) -> list[Tensor]:
    """output, x, A1, B1, A2, B2."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((TOKENS, OUT), (TOKENS, IN), (OUT, r), (r, IN), (OUT, r), (r, IN))
    made = [
        torch.randn(*(n if n == r else size * n for n in shape), generator=generator, dtype=torch.float64)
        for shape in shapes
    ]
    return [t.to(dtype if i < 2 else factors).requires_grad_() for i, t in enumerate(made)]


def run(inputs: list[Tensor]) -> Tensor:
    output, x, a1, b1, a2, b2 = inputs
    return add_hadamard(output * 1, x, (a1, b1, a2, b2), SCALE)


def run_plain(inputs: list[Tensor]) -> Tensor:
    output, x, a1, b1, a2, b2 = inputs
    return add_hadamard_plain(output, x, (a1, b1, a2, b2), SCALE)


@WAYS
def test_the_update_and_its_gradients_equal_the_formula_in_float64(r: int) -> None:
    ours, plain = (leaves(r, torch.float64, torch.float64) for _ in range(2))
    updated, expected = run(ours), run_plain(plain)
    torch.testing.assert_close(updated, expected, rtol=0, atol=1e-12)
    updated.square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-10)


@WAYS
def test_a_float32_update_equals_the_formula_in_float64(r: int) -> None:
    """To 1e-5 of the largest, at four times the sizes, which oneDNN takes."""
    ours = leaves(r, torch.float32, torch.float32, size=4)
    exact = [t.detach().double().requires_grad_() for t in ours]
    run(ours).sum().backward()
    run_plain(exact).sum().backward()
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=0, atol=1e-5 * float(other.grad.abs().max()))


@WAYS
def test_float32_factors_beside_bfloat16_activations_get_float32_gradients(r: int) -> None:
    """Each product rounds to 8 bits, relative 2^-8, three times in a chain: 2% of the largest leaves room for four."""
    ours = leaves(r, torch.bfloat16, torch.float32)
    exact = [t.detach().double().requires_grad_() for t in ours]
    run(ours).sum().backward()
    run_plain(exact).sum().backward()
    assert [t.grad.dtype for t in ours] == [torch.bfloat16] * 2 + [torch.float32] * 4
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=0, atol=0.02 * float(other.grad.abs().max()))


@WAYS
def test_nothing_is_kept_but_the_input_and_the_factors(r: int) -> None:
    inputs = leaves(r, torch.float32, torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run(inputs)
    assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in inputs[1:]}


@WAYS
def test_an_input_that_needs_no_gradient_leaves_the_factors_theirs(r: int) -> None:
    """The first layer of a frozen model: neither its input nor its output asks for a gradient."""
    ours = leaves(r, torch.float64, torch.float64)
    ours[:2] = [t.detach() for t in ours[:2]]
    grads = torch.autograd.grad(run(ours).sum(), ours[2:])
    for one, plain in zip(grads, torch.autograd.grad(run_plain(ours).sum(), ours[2:]), strict=True):
        torch.testing.assert_close(one, plain, rtol=0, atol=1e-12)


def test_two_thin_matrices_make_the_same_product() -> None:
    _, _, a1, b1, a2, b2 = leaves(3, torch.float64, torch.float64)
    b, a = as_low_rank((a1, b1, a2, b2))
    assert (b.shape, a.shape) == ((9, IN), (OUT, 9))
    torch.testing.assert_close(a @ b, (a1 @ b1) * (a2 @ b2), rtol=0, atol=1e-12)


def test_a_token_alone_makes_no_dense_matrix() -> None:
    """As in decoding: 2 * 5^2 * 23 < 11 * 126."""
    inputs = [t if i > 1 else t[:1] for i, t in enumerate(leaves(5, torch.float64, torch.float64))]
    one = run(inputs)
    assert one.grad_fn.name() == "_AddLowRankBackward"
    assert run(leaves(5, torch.float64, torch.float64)).grad_fn.name() == "_AddDenseBackward"
    torch.testing.assert_close(one, run_plain(inputs), rtol=0, atol=1e-12)


@WAYS
def test_without_an_output_there_is_the_update_alone(r: int) -> None:
    output, x, *factors = leaves(r, torch.float64, torch.float64)
    found = add_hadamard(None, x, tuple(factors), SCALE)
    expected = run_plain([torch.zeros_like(output), x, *factors])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    pairs = zip(*(torch.autograd.grad(y.square().sum(), (x, *factors)) for y in (found, expected)), strict=True)
    for ours, plain in pairs:
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-10)
