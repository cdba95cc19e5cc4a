"""The activations of feed-forward layers and bottlenecks, each with its gradient, by the names that recipes and models
use. A kernel that forms an activation again in its backward pass needs both.
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["ACTIVATIONS", "Activation", "ActivationGradient"]

Activation = Callable[[Tensor], Tensor]
ActivationGradient = Callable[[Tensor, Tensor], Tensor]
"""Of the gradient of f(x), and of x."""


def _gelu_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad, x)  # type: ignore[no-any-return]


def _gelu_tanh(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def _gelu_tanh_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")  # type: ignore[no-any-return]


def _relu_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(grad, x, 0)  # type: ignore[no-any-return]


def _silu_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward(grad, x)  # type: ignore[no-any-return]


def _tanh_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.tanh_backward(grad, torch.tanh(x))  # type: ignore[no-any-return]


ACTIVATIONS: dict[str, tuple[Activation, ActivationGradient]] = {
    "gelu": (torch.nn.functional.gelu, _gelu_gradient),
    "gelu_pytorch_tanh": (_gelu_tanh, _gelu_tanh_gradient),
    "relu": (torch.relu, _relu_gradient),
    "silu": (torch.nn.functional.silu, _silu_gradient),
    "tanh": (torch.tanh, _tanh_gradient),
}
