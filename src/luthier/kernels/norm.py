"""RMS normalisation that keeps its input and one number a token for the backward pass.

y = w * x / sqrt(mean(x^2) + eps), computed in float32 whatever x is (Zhang and Sennrich 2019, eq. 4). Gemma's form
multiplies by (1 + w). Plain autograd keeps four float32 tensors of the input's size; this keeps none beyond the
input.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from luthier.kernels.recompute import can_be_formed_again

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """w * x / sqrt(mean(x^2) + eps) over the last dimension. x: [..., hidden]. weight: [hidden]."""
    normed: Tensor = _RMSNorm.apply(x, weight, eps)
    return normed


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _scaled(wide: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    return (wide * inverse).mul_(_wide(weight))


def _normed(x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    return _scaled(_wide(x), weight, inverse).to(x.dtype)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        inverse = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        normed = _scaled(wide, weight, inverse).to(x.dtype)
        if not ctx.needs_input_grad[0]:  # then x is not kept
            return normed
        return can_be_formed_again(normed, _normed, x, weight, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        wide, grad_wide = _wide(x), _wide(grad)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_wide * wide * inverse).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        scaled = grad_wide * _wide(weight)
        along = (scaled * wide).mean(-1, keepdim=True).mul_(inverse.square())
        return scaled.addcmul_(wide, along, value=-1).mul_(inverse).to(x.dtype), grad_weight, None
