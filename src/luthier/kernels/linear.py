"""x W^T + b through the library that is fastest for it, and added to what is there already.

On a CPU, PyTorch hands float32 products to MKL and bfloat16 ones to oneDNN. oneDNN is as fast in float32 too, and often
faster: two AVX-512 cores ran a model's products at 200 to 215 GFLOP/s with it and at 150 to 190 with MKL, and a whole
output layer at 190 instead of 100. So float32 products go there, but for those
of a few rows; everything else takes PyTorch's own way.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from luthier.kernels.recompute import to_keep

__all__ = ["add_linear", "add_product", "has_onednn", "linear", "linear_onto", "product", "whole_product"]

SMALLEST_ROWS = 8  # below, a product is bound by reading the weight, and compiling one for the size is the larger cost


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b. x: [..., in]. weight: [out, in]. bias: [out] or None. Returns [..., out]."""
    if not _suits_onednn(x, weight):
        return torch.nn.functional.linear(x, weight, bias)
    result: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    if x.dim() == 2:  # a view could not be written into as cheaply
        return result
    return result.view(*x.shape[:-1], len(weight))


def linear_onto(onto: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """onto + x W^T + b. onto: [tokens, out], may be written into, and is not needed by what made it.

    The product is summed in float32 with `onto` and b among its terms, and rounded then: so of a small addition to
    large outputs of few bits as much stays as the rounding leaves on average. Of one that is added to the rounded
    product, what is below half a unit in the last place is lost, at every token. Elsewhere than in bfloat16 on a CPU b
    comes after, with a rounding of its own.
    """
    result: Tensor = _LinearOnto.apply(onto, x, weight, bias)
    return result


def add_linear(ctx: Any, onto: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The forward pass of `linear_onto`, for any function that ends in it; `ctx` is told where it wrote into `onto`."""
    result = _added(onto, x, weight, bias)
    if result is onto:
        ctx.mark_dirty(onto)
    return result


def _added(onto: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`onto` itself, or another tensor."""
    if bias is None:
        return add_product(onto, x, weight)
    if not (x.device.type == "cpu" and x.dtype == torch.bfloat16 and _has_narrow_onednn()):
        return add_product(onto, x, weight).add_(bias)
    if isinstance(onto, FakeTensor):
        return torch.empty_like(onto)  # of this product PyTorch does not know what it gives
    result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(_dense(x), onto, _dense(weight), bias, "add")
    return result


def _has_narrow_onednn() -> bool:
    usable = bool(torch.backends.mkldnn.enabled) and torch.backends.mkldnn.is_available()
    return usable and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def add_product(output: Tensor | None, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """output + scale * a b^T, written into `output`, or scale * a b^T where there is none; without a gradient.

    a: [rows, inner]. b: [columns, inner].
    """
    if output is None:
        return a.new_empty(len(a), len(b)).addmm_(a, b.T, alpha=scale, beta=0)
    return output.addmm_(a, b.T, alpha=scale)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T without a gradient. a: [rows, inner]. b: [columns, inner]."""
    if not _suits_onednn(a, b):
        return a @ b.T
    result: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b), None, "none", [], "")
    return result


def _dense(matrix: Tensor) -> Tensor:
    """Without gaps, along rows or along columns: for some columns of a matrix as they lie, oneDNN took 100 to 1,400
    times as long. What `sum()` sends backward has no step at all.
    """
    return matrix if matrix.T.is_contiguous() else matrix.contiguous()


def whole_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b by oneDNN whatever the number of rows, without a gradient; where `has_onednn` says so. For a few rows
    that come again and again: what compiling costs is then paid once. x: [rows, in].
    """
    result: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(x), _dense(weight), bias, "none", [], "")
    return result


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether products of this type go there on a CPU."""
    return dtype == torch.float32 and bool(torch.backends.mkldnn.enabled) and torch.backends.mkldnn.is_available()


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.numel() >= max(1, SMALLEST_ROWS * x.shape[-1])
        and has_onednn(x.dtype)
    )


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        _keep_for_gradients(ctx, x, weight, needs_weight=ctx.needs_input_grad[1])
        result: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(x), _dense(weight), bias, "none", [], "")
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad, ctx.needs_input_grad)


class _LinearOnto(Function):
    @staticmethod
    def forward(ctx: Any, onto: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        _keep_for_gradients(ctx, x, weight, needs_weight=ctx.needs_input_grad[2])
        return add_linear(ctx, onto, x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_onto, *others = ctx.needs_input_grad
        return grad if needs_onto else None, *_gradients(ctx, grad, others)


def _keep_for_gradients(ctx: Any, x: Tensor, weight: Tensor, *, needs_weight: bool) -> None:
    kept: tuple[Tensor, ...] = ()
    if needs_weight:
        kept, ctx.formed_again = to_keep(x)
    ctx.save_for_backward(weight, *kept)


def _gradients(ctx: Any, grad: Tensor, needs_input_grad: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Of x, weight and bias."""
    weight, *kept = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = needs_input_grad
    grad_x = product(grad, weight.T) if needs_x else None
    grad_weight = grad.T @ ctx.formed_again(*kept) if needs_weight else None  # no faster by oneDNN
    return grad_x, grad_weight, grad.sum(0) if needs_bias else None
