"""The gated activation act(gate) * up of today's feed-forward layers, keeping its two inputs and nothing else.

Plain autograd keeps act(gate) as a third tensor of the widest size in the model; here the backward pass forms it again,
which costs one pass over memory and no matrix product.
"""

from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from luthier.kernels.activations import ACTIVATIONS
from luthier.kernels.recompute import can_be_formed_again

__all__ = ["GATES", "gated"]


GATES = {name: ACTIVATIONS[name] for name in ("gelu_pytorch_tanh", "silu")}


def gated(gate: Tensor, up: Tensor, *, activation: str) -> Tensor:
    """act(gate) * up, elementwise (Shazeer 2020, eq. 6). activation: a key of GATES."""
    product: Tensor = _Gated.apply(gate, up, activation)
    return product


def _gated(gate: Tensor, up: Tensor, *, activation: str) -> Tensor:
    return GATES[activation][0](gate).mul_(up)


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        form = partial(_gated, activation=activation)
        if not any(ctx.needs_input_grad):
            return form(gate, up)
        return can_be_formed_again(form(gate, up), form, gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        act, act_gradient = GATES[ctx.activation]
        grad_up = act(gate).mul_(grad)
        return act_gradient(grad * up, gate), grad_up, None
