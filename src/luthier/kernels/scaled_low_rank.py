"""The update y + b * (d * (x A^T)) B^T of two frozen matrices with a learned factor for each of their rows.

Plain autograd would keep a product of [tokens, r] and another as large as the output. Here the narrow one alone stays;
the gradients of the factors are found from it and from the frozen pair, which all layers share. x is not needed again.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from luthier.kernels.linear import product

__all__ = ["Scaled", "add_scaled_low_rank", "add_scaled_low_rank_plain"]

Scaled = tuple[Tensor, Tensor, Tensor, Tensor]
"""A [r, in] and B [out, r], which are frozen, and the factors of their rows, d [r] and b [out]."""


def add_scaled_low_rank_plain(output: Tensor, x: Tensor, parts: Scaled) -> Tensor:
    """The same by definition; what `add_scaled_low_rank` is tested against."""
    a, b, a_factors, b_factors = (part.to(x.dtype) for part in parts)
    return output + b_factors * ((a_factors * (x @ a.T)) @ b.T)


def add_scaled_low_rank(output: Tensor | None, x: Tensor, parts: Scaled) -> Tensor:
    """output + b * (d * (x A^T)) B^T, written into `output`, which must not be needed by what made it; the update alone
    where there is no output.

    output: [tokens, out] or None. x: [tokens, in]. Products run in the output's type, or in x's; the factors' gradients
    come in their own.
    """
    updated: Tensor = _AddScaledLowRank.apply(output, x if output is None else x.to(output.dtype), *parts)
    return updated


class _AddScaledLowRank(Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor | None, x: Tensor, a: Tensor, b: Tensor, a_factors: Tensor, b_factors: Tensor
    ) -> Tensor:
        narrow = product(x, a.to(x.dtype))
        ctx.save_for_backward(narrow, a, b, a_factors, b_factors)
        update = product(narrow * a_factors.to(x.dtype), b.to(x.dtype))
        if output is None:
            return update.mul_(b_factors)
        ctx.mark_dirty(output)
        return output.addcmul_(update, b_factors.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        narrow, a, b, a_factors, b_factors = ctx.saved_tensors
        across = product((narrow * a_factors.to(grad.dtype)).T, grad.T)  # [r, out]
        grad_b_factors = (across.T * b).sum(1, dtype=b_factors.dtype)
        grad_scaled = product(grad, (b * b_factors[:, None]).to(grad.dtype).T)  # of d * (x A^T): [tokens, r]
        grad_x = product(grad_scaled, (a * a_factors[:, None]).to(grad.dtype).T) if ctx.needs_input_grad[1] else None
        grad_a_factors = grad_scaled.mul_(narrow).sum(0, dtype=a_factors.dtype)
        grad_output = grad if ctx.needs_input_grad[0] else None
        return grad_output, grad_x, None, None, grad_a_factors, grad_b_factors
