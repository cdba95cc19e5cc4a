"""The update by a frozen pair with learned factors is the plain formula, in value and in gradient."""

import torch
from torch import Tensor

from luthier.kernels.scaled_low_rank import add_scaled_low_rank, add_scaled_low_rank_plain

TOKENS, IN, OUT, RANK = 11, 7, 5, 3


def leaves(dtype: torch.dtype, parts: torch.dtype, *, size: int = 1) -> list[Tensor]:
    """output, x, A, B, d, b; A and B frozen."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((TOKENS, OUT), (TOKENS, IN), (RANK, IN), (OUT, RANK), (RANK,), (OUT,))
    made = [torch.randn([size * n for n in shape], generator=generator, dtype=torch.float64) for shape in shapes]
    return [t.to(dtype if i < 2 else parts).requires_grad_(i not in (2, 3)) for i, t in enumerate(made)]


def gradients(inputs: list[Tensor], *, plain: bool = False) -> tuple[Tensor, ...]:
    """Of output, x, d and b."""
    output, x, *parts = inputs
    add = add_scaled_low_rank_plain if plain else add_scaled_low_rank
    return torch.autograd.grad(add(output * 1, x, tuple(parts)).square().sum(), [output, x, *parts[2:]])


def test_the_update_and_its_gradients_equal_the_formula_in_float64() -> None:
    inputs = leaves(torch.float64, torch.float64)
    output, x, *parts = inputs
    expected = add_scaled_low_rank_plain(output, x, tuple(parts))
    torch.testing.assert_close(add_scaled_low_rank(output * 1, x, tuple(parts)), expected, rtol=0, atol=1e-12)
    for one, other in zip(gradients(inputs), gradients(inputs, plain=True), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_a_wide_float32_update_equals_the_formula_in_float64() -> None:
    """To 1e-5 of the largest, at sizes that oneDNN takes."""
    inputs = leaves(torch.float32, torch.float32, size=4)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    for one, other in zip(gradients(inputs), gradients(exact, plain=True), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-5 * float(other.abs().max()))


def test_float32_factors_beside_bfloat16_activations_get_float32_gradients() -> None:
    """Each product rounds to 8 bits, relative 2^-8, in chains of three: 2% of the largest leaves room for five."""
    inputs = leaves(torch.bfloat16, torch.float32)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    found = gradients(inputs)
    assert [t.dtype for t in found] == [torch.bfloat16] * 2 + [torch.float32] * 2
    for one, other in zip(found, gradients(exact, plain=True), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=0.02 * float(other.abs().max()))


def test_one_narrow_product_is_kept_besides_what_is_there_anyway() -> None:
    output, x, *parts = leaves(torch.float32, torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        add_scaled_low_rank(output * 1, x, tuple(parts))
    there = {t.data_ptr() for t in parts}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in there] == [(TOKENS, RANK)]


def test_the_update_is_written_into_the_output_that_was_given() -> None:
    output, x, *parts = (t.detach() for t in leaves(torch.float32, torch.float32))
    assert add_scaled_low_rank(output, x, tuple(parts)).data_ptr() == output.data_ptr()


def test_an_input_that_needs_no_gradient_leaves_the_factors_theirs() -> None:
    """The first layer of a frozen model: neither its input nor its output asks for a gradient."""
    output, x, *parts = leaves(torch.float64, torch.float64)
    updated = add_scaled_low_rank(output.detach().clone(), x.detach(), tuple(parts))
    expected = add_scaled_low_rank_plain(output, x, tuple(parts))
    for one, other in zip(*(torch.autograd.grad(y.sum(), parts[2:]) for y in (updated, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_without_an_output_there_is_the_update_alone() -> None:
    output, x, *parts = leaves(torch.float64, torch.float64)
    found = add_scaled_low_rank(None, x, tuple(parts))
    expected = add_scaled_low_rank_plain(torch.zeros_like(output), x, tuple(parts))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    learned = (x, *parts[2:])
    pairs = zip(*(torch.autograd.grad(y.square().sum(), learned) for y in (found, expected)), strict=True)
    for ours, plain in pairs:
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-10)
