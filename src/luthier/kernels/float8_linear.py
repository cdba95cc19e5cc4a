"""x W^T + b with both factors in eight bits, and its gradients        Micikevicius et al. 2022, section 3

Input and weight are rounded to E4M3, the gradient of the output to E5M2, each by a scale of its own; products of codes
are summed in float32 and divided by both scales. Where the device multiplies eight-bit floats itself (CUDA from
capability 8.9 on) that product is used. Elsewhere the codes are multiplied in float32, which holds each product of two
of them exactly: the same numbers but for the order of summation, and slower than a product in the layer's own type.
Nothing is kept in eight bits between the passes: the backward pass rounds again, by the scales of the forward pass.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from luthier.kernels.float8 import ROLES, AmaxWindows, Float8, codes_of
from luthier.kernels.linear import product
from luthier.kernels.recompute import to_keep

__all__ = ["device_product", "float8_linear", "has_float8_product", "scaled_product"]

_MULTIPLE = 16  # of which CUDA's product wants its columns


def float8_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, windows: AmaxWindows, *, onto: Tensor | None = None
) -> Tensor:
    """x W^T + b. x: [..., in]. weight: [out, in]. bias: [out] or None, not rounded. Returns [..., out] in x's type.

    windows: have the scales, and note what they are to follow. onto: [tokens, out] in x's type, to which the sum is
    added where it lies. Whatever is added is so in float32, before the one rounding.
    """
    rows = x.reshape(-1, x.shape[-1])
    result: Tensor = _Float8Linear.apply(onto, rows, weight, bias, windows, windows.notes)
    return result if x.dim() == 2 else result.view(*x.shape[:-1], len(weight))


class _Float8Linear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        onto: Tensor | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        windows: AmaxWindows,
        noted: bool,
    ) -> Tensor:
        x8, weight8 = windows.quantize("input", x, noted=noted), windows.quantize("weight", weight, noted=noted)
        kept: tuple[Tensor, ...] = ()
        if ctx.needs_input_grad[2]:
            kept, ctx.formed_again = to_keep(x)
        ctx.save_for_backward(weight, weight8.scale, x8.scale, *kept)
        ctx.windows, ctx.noted = windows, noted
        if onto is None and bias is None:
            return scaled_product(x8, weight8, x.dtype)
        summed = scaled_product(x8, weight8, torch.promote_types(x.dtype, torch.float32))
        if bias is not None:
            summed.add_(bias)
        if onto is None:
            return summed.to(x.dtype)
        ctx.mark_dirty(onto)
        return onto.add_(summed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, weight_scale, x_scale, *kept = ctx.saved_tensors
        needs_onto, needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad8 = ctx.windows.quantize("gradient", grad, noted=ctx.noted)
        grad_x = grad_weight = None
        if needs_x:
            weight8 = Float8(codes_of(weight, weight_scale, ROLES["weight"]), weight_scale)
            grad_x = scaled_product(grad8, weight8.T, grad.dtype)
        if needs_weight:
            x8 = Float8(codes_of(ctx.formed_again(*kept), x_scale, ROLES["input"]), x_scale)
            grad_weight = scaled_product(grad8.T, x8.T, weight.dtype)
        grad_bias = grad.sum(0) if needs_bias else None
        return grad if needs_onto else None, grad_x, grad_weight, grad_bias, None, None


def scaled_product(a: Float8, b: Float8, dtype: torch.dtype) -> Tensor:
    """a b^T, summed in float32. a: [rows, inner]. b: [columns, inner]; no two of E5M2."""
    if has_float8_product(a.codes.device):
        return device_product(a, b, dtype)
    summed = product(a.codes.float(), b.codes.float())
    return summed.mul_(a.scale.reciprocal() * b.scale.reciprocal()).to(dtype)


def has_float8_product(device: torch.device) -> bool:
    """Whether the device multiplies these formats itself. A CPU can, by PyTorch 2.13, and no faster than in float32."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device) >= (8, 9)


def device_product(a: Float8, b: Float8, dtype: torch.dtype) -> Tensor:
    """`scaled_product` by the device's own; both are made up with zeros to multiples of 16."""
    made_up: Tensor = torch._scaled_mm(
        _made_up(a.codes),
        _made_up(b.codes).T,
        scale_a=a.scale.reciprocal(),
        scale_b=b.scale.reciprocal(),
        out_dtype=dtype,
    )
    shape = len(a.codes), len(b.codes)
    return made_up if made_up.shape == shape else made_up[: shape[0], : shape[1]].clone()


def _made_up(codes: Tensor) -> Tensor:
    """Row by row, with columns and rows of zeros, whose code is 0 in both formats."""
    rows, columns = (-size % _MULTIPLE for size in codes.shape)
    whole = codes.contiguous()
    if not rows and not columns:
        return whole
    return torch.nn.functional.pad(whole.view(torch.uint8), (0, columns, 0, rows)).view(codes.dtype)
