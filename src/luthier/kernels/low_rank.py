"""The low-rank update y + scale * (x A^T) B^T, with a backward pass that keeps two tensors and writes in place.

Plain autograd would save x twice, the product with A, and a scaled copy of the whole output. Here the update is added
into the output of the frozen layer where it lies, and only x (which neighbouring layers share) and the narrow
[tokens, r] product stay.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function

__all__ = ["add_low_rank", "add_low_rank_plain"]


def add_low_rank_plain(output: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The same by definition; what `add_low_rank` is tested against."""
    return output + scale * ((x @ a.T.to(x.dtype)) @ b.T.to(x.dtype))


def add_low_rank(output: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """output + scale * (x A^T) B^T, written into `output`, which must not be needed by the layer that made it.

    output: [tokens, out]. x: [tokens, in]. a: [r, in]. b: [out, r]. Products run in x's type, gradients of A and B
    come in their own (float32 masters over a bfloat16 base).
    """
    updated: Tensor = _AddLowRank.apply(output, x, a, b, scale)
    return updated


class _AddLowRank(Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        narrow = x @ a.T.to(x.dtype)
        ctx.save_for_backward(x, a, b, narrow)
        ctx.scale = scale
        ctx.mark_dirty(output)
        return output.addmm_(narrow, b.T.to(x.dtype), alpha=scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, narrow = ctx.saved_tensors
        grad_narrow = (grad @ b.to(grad.dtype)).mul_(ctx.scale)
        grad_b = (grad.T @ narrow).to(b.dtype).mul_(ctx.scale)
        grad_a = (grad_narrow.T @ x).to(a.dtype)
        grad_x = grad_narrow @ a.to(grad.dtype) if ctx.needs_input_grad[1] else None
        return grad, grad_x, grad_a, grad_b, None
