"""The update y + scale * x (C kron D)^T, without the Kronecker product.

A row of x, laid out as a matrix X of as many rows as C has columns, becomes C X D^T: two small products instead of one
with a weight of the layer's size. The second writes where the layer's output lies. The backward pass keeps x and the
two factors and forms the product between again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from luthier.kernels.linear import add_product, product
from luthier.kernels.recompute import to_keep

__all__ = ["add_kronecker", "add_kronecker_plain"]


def add_kronecker_plain(output: Tensor, x: Tensor, c: Tensor, d: Tensor, scale: float) -> Tensor:
    """The same by definition; what `add_kronecker` is tested against."""
    return output + scale * (x @ torch.kron(c, d).T.to(x.dtype))


def add_kronecker(output: Tensor | None, x: Tensor, c: Tensor, d: Tensor, scale: float) -> Tensor:
    """output + scale * x (C kron D)^T, written into `output`, which must be dense and not needed by what made it; the
    update alone where there is no output.

    c: [l, m]. d: [k, n]. output: [tokens, l k] or None. x: [tokens, m n]. Products run in the output's type, or in x's;
    the gradients of C and D come in their own.
    """
    updated: Tensor = _AddKronecker.apply(output, x if output is None else x.to(output.dtype), c, d, scale)
    return updated


def _left(c: Tensor, x: Tensor) -> Tensor:
    """C X of every token. c: [l, m]. x: [tokens, m, n] -> [tokens, l, n]."""
    return torch.bmm(c.expand(len(x), *c.shape), x)


class _AddKronecker(Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor | None, x: Tensor, c: Tensor, d: Tensor, scale: float) -> Tensor:
        (num_rows, num_columns), (k, n) = c.shape, d.shape
        x = x.reshape(-1, num_columns, n)
        kept, ctx.formed_again = to_keep(x)
        ctx.save_for_backward(c, d, *kept)
        ctx.scale = scale
        between = _left(c.to(x.dtype), x).view(-1, n)  # [tokens l, n]
        if output is None:
            output = x.new_zeros(len(x), num_rows * k)  # no view of what is formed: it is going to be written into
        else:
            ctx.mark_dirty(output)
        add_product(output.view(-1, k), between, d.to(x.dtype), scale)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        c, d, *kept = ctx.saved_tensors
        x = ctx.formed_again(*kept)
        num_left, (k, n) = len(c), d.shape
        c_cast, d_cast = c.to(x.dtype), d.to(x.dtype)
        narrow = grad.reshape(-1, k)  # [tokens l, k]
        between = _left(c_cast, x).view(-1, n)
        grad_d = product(narrow.T, between.T).to(d.dtype).mul_(ctx.scale)
        grad_between = product(narrow, d_cast.T).mul_(ctx.scale).view(-1, num_left, n)
        by_token = torch.bmm(grad_between, x.transpose(1, 2))  # [tokens, l, m]
        grad_x = _left(c_cast.T, grad_between).flatten(1) if ctx.needs_input_grad[1] else None
        grad_output = grad if ctx.needs_input_grad[0] else None
        return grad_output, grad_x, by_token.sum(0, dtype=c.dtype), grad_d, None
