"""The bottleneck kernel equals its definition, forward and backward, and keeps little."""

import pytest
import torch
from torch import Tensor

from luthier.kernels.bottleneck import ACTIVATIONS, Middle, Weights, add_bottleneck, add_bottleneck_plain

TOKENS, HIDDEN, SIZE = 24, 20, 6


def tensors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Weights]:
    """y, x and the weights."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((TOKENS, HIDDEN), (TOKENS, HIDDEN), (SIZE, HIDDEN), (SIZE,), (HIDDEN, SIZE), (HIDDEN,))
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    return made[0], made[1], Weights(*made[2:])


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_gradients_agree_with_finite_differences(activation: str, parallel: bool) -> None:
    y, x, weights = tensors()
    middle = Middle(activation, scale=0.7)

    def run(y: Tensor, x: Tensor, *weights: Tensor) -> Tensor:
        return add_bottleneck(y, x if parallel else None, Weights(*weights), middle)

    assert torch.autograd.gradcheck(run, (y, x, *weights), fast_mode=True)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_it_equals_its_definition_in_float32(activation: str, parallel: bool) -> None:
    """To 1e-4 of numbers up to 50: sums of 24 products in another order."""
    middle = Middle(activation, scale=1.5)
    results, gradients = [], []
    for add in (add_bottleneck, add_bottleneck_plain):
        y, x, weights = tensors(torch.float32)
        read = x if parallel else (None if add is add_bottleneck else y)
        result = add(y, read, weights, middle)  # type: ignore[arg-type]
        result.square().sum().backward()
        results.append(result.detach())
        gradients.append([t.grad for t in (y, *weights, *([x] if parallel else []))])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-2)


def test_what_is_added_to_stays_as_it_is() -> None:
    y, _, weights = tensors(torch.float32)
    before = y.detach().clone()
    add_bottleneck(y, None, weights, Middle("relu", 1.0))
    assert torch.equal(y, before)


def test_only_the_input_and_narrow_rows_are_kept() -> None:
    """y [24, 20] and the narrow rows [24, 6], besides D and U."""
    y, _, weights = tensors(torch.float32)
    kept: dict[int, int] = {}
    own = {t.data_ptr() for t in weights}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
        add_bottleneck(y, None, weights, Middle("silu", 0.5))
    assert sum(size for place, size in kept.items() if place not in own) == 4 * TOKENS * (HIDDEN + SIZE)


def test_dropped_rows_of_the_middle_reach_neither_result_nor_gradient() -> None:
    """U = 1 and f = relu on a middle of ones: each kept number adds 1 / (1 - 0.5) = 2, and U's gradient is its sum."""
    y = torch.zeros(200, SIZE, requires_grad=True)
    up = torch.eye(SIZE, requires_grad=True)
    weights = Weights(torch.zeros(SIZE, SIZE), torch.ones(SIZE), up, torch.zeros(SIZE))
    torch.manual_seed(0)
    result = add_bottleneck(y, None, weights, Middle("relu", 1.0, dropout=0.5))
    assert set(result.detach().unique().tolist()) == {0.0, 2.0}
    assert 0.4 < float((result > 0).float().mean()) < 0.6
    result.sum().backward()
    assert up.grad is not None
    torch.testing.assert_close(up.grad, result.detach().sum(0).expand(SIZE, SIZE))


def test_bfloat16_rows_give_float32_gradients() -> None:
    """Within two roundings of bfloat16, 2^-7, of the exact gradient's largest number."""
    y, _, weights = tensors(torch.float32)
    narrow = y.detach().bfloat16().requires_grad_()
    add_bottleneck(narrow, None, weights, Middle("gelu", 1.0)).float().sum().backward()
    found = [w.grad for w in weights]
    exact = tensors()
    add_bottleneck(exact[0], None, exact[2], Middle("gelu", 1.0)).sum().backward()
    for gradient, true in zip(found, exact[2], strict=True):
        assert gradient is not None
        assert gradient.dtype == torch.float32
        assert true.grad is not None
        assert (gradient - true.grad).abs().max() <= 2**-7 * true.grad.abs().max()
