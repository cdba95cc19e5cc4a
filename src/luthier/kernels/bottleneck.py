"""The bottleneck y + s (U f(D x + d) + u), with a backward pass that keeps its input and one narrow tensor.

Plain autograd keeps f's output too, scales and adds the wide product in passes of their own, and where x is y itself
sums the two ways of its gradient in another. Here s goes into the narrow factors and the sums into the products. The
result is a new tensor and not y overwritten: where x is y, the gradient of D needs it.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from luthier.kernels.activations import ACTIVATIONS
from luthier.kernels.linear import product

__all__ = ["Middle", "Weights", "add_bottleneck", "add_bottleneck_plain"]


class Weights(NamedTuple):
    """down: D [size, hidden]. down_bias: d [size]. up: U [hidden, size]. up_bias: u [hidden]."""

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor


@dataclass(frozen=True, slots=True)
class Middle:
    """activation: f, a key of ACTIVATIONS. scale: s. dropout: the share of f's output that is dropped."""

    activation: str
    scale: float
    dropout: float = 0.0


def add_bottleneck_plain(output: Tensor, x: Tensor, weights: Weights, middle: Middle) -> Tensor:
    """The same by definition; what `add_bottleneck` is tested against."""
    down, down_bias, up, up_bias = (w.to(output.dtype) for w in weights)
    inner = ACTIVATIONS[middle.activation][0](x @ down.T + down_bias)
    dropped = torch.nn.functional.dropout(inner, middle.dropout)
    return output + middle.scale * (dropped @ up.T + up_bias)


def add_bottleneck(output: Tensor, x: Tensor | None, weights: Weights, middle: Middle) -> Tensor:
    """output + s (U dropout(f(D x + d)) + u), in a tensor of its own.

    output: y [tokens, hidden]. x: [tokens, hidden], or None where it is y. Products run in y's type, gradients of the
    weights come in their own (float32 masters over a bfloat16 base).
    """
    x = None if x is None else x.to(output.dtype)  # of another one under autocast
    updated: Tensor = _AddBottleneck.apply(output, x, *weights, middle)
    return updated


class _AddBottleneck(Function):
    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        x: Tensor | None,
        down: Tensor,
        down_bias: Tensor,
        up: Tensor,
        up_bias: Tensor,
        middle: Middle,
    ) -> Tensor:
        ctx.middle, ctx.reads_output, ctx.types = middle, x is None, [w.dtype for w in (down, down_bias, up, up_bias)]
        read, down, up = output if x is None else x, down.to(output.dtype), up.to(output.dtype)
        narrow = product(read, down).add_(down_bias)
        kept = torch.rand_like(narrow) >= middle.dropout if middle.dropout else None
        ctx.save_for_backward(read, down, up, narrow, kept)
        inner = _scaled(ACTIVATIONS[middle.activation][0](narrow), kept, middle)
        return torch.addmm(output, inner, up.T).add_(up_bias, alpha=middle.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        read, down, up, narrow, kept = ctx.saved_tensors
        activate, activation_gradient = ACTIVATIONS[ctx.middle.activation]
        inner = _scaled(activate(narrow), kept, ctx.middle)
        grad_narrow = activation_gradient(_scaled(product(grad, up.T), kept, ctx.middle), narrow)
        down_type, down_bias_type, up_type, up_bias_type = ctx.types
        grads_of_weights = (
            product(grad_narrow.T, read.T).to(down_type),
            grad_narrow.sum(0, dtype=down_bias_type),
            (grad.T @ inner).to(up_type),
            grad.sum(0, dtype=up_bias_type).mul_(ctx.middle.scale),
        )
        if ctx.needs_input_grad[1]:
            return grad, product(grad_narrow, down.T), *grads_of_weights, None
        if ctx.reads_output and ctx.needs_input_grad[0]:
            grad = torch.addmm(grad, grad_narrow, down)
        return grad, None, *grads_of_weights, None


def _scaled(inner: Tensor, kept: Tensor | None, middle: Middle) -> Tensor:
    """s inner / (1 - dropout) where it is kept, else 0; written into `inner`."""
    inner = inner.mul_(middle.scale / (1 - middle.dropout))
    return inner if kept is None else inner.mul_(kept)
