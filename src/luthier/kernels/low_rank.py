"""The low-rank update y + scale * (x A^T) B^T, added into the output of the frozen layer where it lies; or without y.

For the backward pass x, which neighbouring layers share, and the narrow [tokens, r] product stay: in one type, what
plain autograd keeps too. What this saves is the update as a wide tensor of its own, on the way there and back, and the
passes that scale and add it; and the float32 copy of x that stays where float32 factors meet a bfloat16 x.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from luthier.kernels.linear import add_product, product
from luthier.kernels.recompute import to_keep

__all__ = ["add_low_rank", "add_low_rank_plain"]


def add_low_rank_plain(output: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The same by definition; what `add_low_rank` is tested against."""
    return output + scale * ((x @ a.T.to(x.dtype)) @ b.T.to(x.dtype))


def add_low_rank(output: Tensor | None, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """output + scale * (x A^T) B^T, written into `output`, which must not be needed by the layer that made it; the
    update alone where there is no output.

    output: [tokens, out] or None. x: [tokens, in]. a: [r, in]. b: [out, r]. Products run in the output's type, or in
    x's; gradients of A and B come in their own (float32 masters over a bfloat16 base).
    """
    updated: Tensor = _AddLowRank.apply(output, x if output is None else x.to(output.dtype), a, b, scale)
    return updated


class _AddLowRank(Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor | None, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        a_cast, b_cast = a.to(x.dtype), b.to(x.dtype)
        narrow = product(x, a_cast)
        kept, ctx.formed_again = to_keep(x)
        ctx.save_for_backward(a_cast, b_cast, narrow, *kept)
        ctx.scale, ctx.types = scale, (a.dtype, b.dtype)
        if output is not None:
            ctx.mark_dirty(output)
        return add_product(output, narrow, b_cast, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, narrow, *kept = ctx.saved_tensors
        x = ctx.formed_again(*kept)
        grad_narrow = product(grad, b.T).mul_(ctx.scale)
        grad_b = product(narrow.T, grad.T).T.to(ctx.types[1]).mul_(ctx.scale)
        grad_a = product(grad_narrow.T, x.T).to(ctx.types[0])
        grad_x = product(grad_narrow, a.T) if ctx.needs_input_grad[1] else None
        return grad if ctx.needs_input_grad[0] else None, grad_x, grad_a, grad_b, None
