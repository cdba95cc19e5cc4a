"""The update y + scale * x ((A1 B1) * (A2 B2))^T of two low-rank products, multiplied element by element.

Their product has rank r^2: each of its columns pairs one of A1 with one of A2, each of its rows one of B1 with one of
B2. As long as r^2 or the number of tokens is small, these two thin matrices are far cheaper than the dense
one. The backward
pass keeps x and the factors and forms everything else again.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from luthier.kernels.linear import add_product, product
from luthier.kernels.recompute import to_keep

__all__ = ["Hadamard", "add_hadamard", "add_hadamard_plain", "as_low_rank"]

Hadamard = tuple[Tensor, Tensor, Tensor, Tensor]
"""A1 [out, r], B1 [r, in], A2 [out, r], B2 [r, in]."""


def add_hadamard_plain(output: Tensor, x: Tensor, factors: Hadamard, scale: float) -> Tensor:
    """The same by definition; what `add_hadamard` is tested against."""
    a1, b1, a2, b2 = factors
    return output + scale * (x @ ((a1 @ b1) * (a2 @ b2)).T.to(x.dtype))


def add_hadamard(output: Tensor | None, x: Tensor, factors: Hadamard, scale: float) -> Tensor:
    """output + scale * x ((A1 B1) * (A2 B2))^T, written into `output`, which must not be needed by what made it; the
    update alone where there is no output.

    output: [tokens, out] or None. x: [tokens, in]. Products over tokens run in the output's type, or in x's; gradients
    of the factors come in their own.
    """
    way = _AddLowRank if _thin_is_cheaper(x, factors) else _AddDense
    updated: Tensor = way.apply(output, x if output is None else x.to(output.dtype), *factors, scale)
    return updated


def _thin_is_cheaper(x: Tensor, factors: Hadamard) -> bool:
    """By multiplications: those of forming the matrices and those of every token."""
    (num_out, r), (num_tokens, num_in) = factors[0].shape, x.shape
    return (1 + num_tokens) * r * r * (num_in + num_out) < (2 * r + num_tokens) * num_in * num_out


def as_low_rank(factors: Hadamard) -> tuple[Tensor, Tensor]:
    """B [r^2, in] and A [out, r^2] with A B = (A1 B1) * (A2 B2)."""
    a1, b1, a2, b2 = factors
    b = (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)
    a = (a1[:, :, None] * a2[:, None, :]).flatten(1, 2)
    return b, a


class _AddLowRank(Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor | None, x: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float
    ) -> Tensor:
        kept, ctx.formed_again = to_keep(x)
        ctx.save_for_backward(a1, b1, a2, b2, *kept)
        ctx.scale = scale
        if output is not None:
            ctx.mark_dirty(output)
        b, a = (t.to(x.dtype) for t in as_low_rank((a1, b1, a2, b2)))
        return add_product(output, product(x, b), a, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a1, b1, a2, b2, *kept = ctx.saved_tensors
        x = ctx.formed_again(*kept)
        r = a1.shape[1]
        b, a = (t.to(x.dtype) for t in as_low_rank((a1, b1, a2, b2)))
        grad_narrow = product(grad, a.T).mul_(ctx.scale)  # [tokens, r^2]
        grad_b = product(grad_narrow.T, x.T).to(b1.dtype).view(r, r, -1)
        grad_a = product(grad.T, product(x, b).T).to(a1.dtype).mul_(ctx.scale).view(-1, r, r)
        grad_x = product(grad_narrow, b.T) if ctx.needs_input_grad[1] else None
        return (
            *(grad if ctx.needs_input_grad[0] else None, grad_x),
            *((grad_a * a2[:, None, :]).sum(2), (grad_b * b2).sum(1)),
            *((grad_a * a1[:, :, None]).sum(1), (grad_b * b1[:, None]).sum(0)),
            None,
        )


class _AddDense(Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor | None, x: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float
    ) -> Tensor:
        kept, ctx.formed_again = to_keep(x)
        ctx.save_for_backward(a1, b1, a2, b2, *kept)
        ctx.scale = scale
        if output is not None:
            ctx.mark_dirty(output)
        dense = product(a1, b1.T).mul_(product(a2, b2.T))
        return add_product(output, x, dense.to(x.dtype), scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a1, b1, a2, b2, *kept = ctx.saved_tensors
        x = ctx.formed_again(*kept)
        first, second = product(a1, b1.T), product(a2, b2.T)
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = product(grad, (first * second).to(grad.dtype).T).mul_(ctx.scale)
        grad_dense = product(grad.T, x.T).to(a1.dtype).mul_(ctx.scale)
        grad_first, grad_second = second.mul_(grad_dense), first.mul_(grad_dense)
        return (
            *(grad if ctx.needs_input_grad[0] else None, grad_x),
            *(product(grad_first, b1), product(a1.T, grad_first.T)),
            *(product(grad_second, b2), product(a2.T, grad_second.T)),
            None,
        )
