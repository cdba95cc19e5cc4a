"""Linear layers whose frozen weight is stored in few bits, and a network's layers exchanged for them.

The dense weight exists only while a product runs: forward makes it and drops it, backward makes it again. The product
itself is the one that dense layers have, in the type that the dense weight had, so an adapter sees no difference.
Nothing here learns but the bias, which stays as it was.
"""

from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from luthier.errors import ModelError
from luthier.kernels.linear import add_linear, linear, product
from luthier.quant.int8 import INT8
from luthier.quant.nf4 import NF4
from luthier.recipe.problems import unknown

__all__ = ["QUANTIZERS", "QuantizedLinear", "Stored", "quantize_layers", "round_trip"]

Stored = NF4 | INT8

QUANTIZERS: dict[str, type[Stored]] = {"nf4": NF4, "int8": INT8}

COMPUTE_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class QuantizedLinear(nn.Module):
    """x W^T + b, W stored as `scheme` says and frozen.

    Its buffers are the fields of QUANTIZERS[scheme], under their names; scales stay float32 whatever type the network
    is moved to, since they were made for these codes.
    """

    takes_onto = True

    def __init__(self, stored: Stored, bias: nn.Parameter | None, *, shape: torch.Size, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.format, self.shape, self.dtype = type(stored), shape, dtype
        for name, tensor in stored._asdict().items():
            self.register_buffer(name, tensor)
        self.bias = bias

    @classmethod
    def of(cls, linear: nn.Module, scheme: str, *, weight: Tensor | None = None) -> "QuantizedLinear":
        """The layer with its weight quantized and its bias shared. weight: what is stored instead of the layer's own,
        as without the part of it that an adapter starts from. Raises ModelError for a scheme that is unknown, a layer
        that is no dense linear one, or a weight that is no matrix of floating-point numbers.
        """
        if not isinstance(linear, nn.Linear):
            raise ModelError(f"a {type(linear).__name__} cannot be quantized; give a dense linear layer")
        stored = _quantize(linear.weight if weight is None else weight, scheme)
        made = cls(stored, linear.bias, shape=linear.weight.shape, dtype=linear.weight.dtype)
        return made.train(linear.training)

    @property
    def stored(self) -> Stored:
        """What is kept of the weight."""
        return self.format(*(self.get_buffer(name) for name in self.format._fields))

    @property
    def scheme(self) -> str:
        """The recipe's word for how the weight is stored."""
        return next(word for word, kind in QUANTIZERS.items() if kind is self.format)

    @property
    def num_bytes(self) -> int:
        """What the stored weight takes, codes and scales."""
        return sum(tensor.nbytes for tensor in self.stored)

    @property
    def weight(self) -> Tensor:
        """The dense weight [out, in] that the layer multiplies by, made anew at each call."""
        return self.stored.dense(self.shape, self.dtype)

    def forward(self, x: Tensor, *, onto: Tensor | None = None) -> Tensor:
        """x: [..., in] -> [..., out], a tensor of its own, which may be written into; with `onto`, [tokens, out], added
        to it, perhaps where it lies.
        """
        rows = x.reshape(-1, x.shape[-1])
        result: Tensor = _FrozenProduct.apply(onto, rows, self.bias, self.stored, self.shape, self.dtype)
        return result if x.dim() == 2 else result.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Shown where the network is printed."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, scheme={self.scheme}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        before = self.stored
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=before.codes.device)).dtype
        for name, old, new in zip(before._fields, before, self.stored, strict=True):
            if old.dtype != new.dtype:
                self.register_buffer(name, old.to(new.device))
        return self


class _FrozenProduct(Function):
    @staticmethod
    def forward(
        ctx: Any,
        onto: Tensor | None,
        x: Tensor,
        bias: Tensor | None,
        stored: Stored,
        shape: torch.Size,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.format, ctx.shape, ctx.dtype = type(stored), shape, dtype
        if onto is None:
            return linear(x, stored.dense(shape, dtype), bias)
        return add_linear(ctx, onto, x, stored.dense(shape, dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_onto, needs_x, needs_bias, *_ = ctx.needs_input_grad
        stored: Stored = ctx.format(*ctx.saved_tensors)
        grad_x = product(grad, stored.dense(ctx.shape, ctx.dtype).T) if needs_x else None
        return grad if needs_onto else None, grad_x, grad.sum(0) if needs_bias else None, None, None, None


def round_trip(weight: Tensor, scheme: str) -> Tensor:
    """The weight [out, in] as it is after being stored by `scheme`, in its own type. Raises ModelError as
    `QuantizedLinear.of` does.
    """
    return _quantize(weight, scheme).dense(weight.shape, weight.dtype)


@torch.no_grad()
def _quantize(weight: Tensor, scheme: str) -> Stored:
    if scheme not in QUANTIZERS:
        raise ModelError(f'quantize_base: "{scheme}": {unknown("scheme", scheme, list(QUANTIZERS))}')
    if weight.dim() != 2 or weight.dtype not in COMPUTE_TYPES or weight.numel() == 0:
        kind = f"{str(weight.dtype).removeprefix('torch.')} of shape {list(weight.shape)}"
        raise ModelError(f"a weight of type {kind} cannot be quantized; give a matrix of floating-point numbers")
    return QUANTIZERS[scheme].of(weight)


def quantize_layers(
    network: nn.Module,
    scheme: str,
    *,
    keep: Collection[str] = (),
    strip: Callable[[str, Tensor], Tensor] | None = None,
    exchanged: Callable[[str, QuantizedLinear], None] | None = None,
) -> int:
    """Stores the weights of the network's linear layers by `scheme`, in place and one after the other, so that no more
    than one dense weight is there besides what it becomes. Returns how many layers were exchanged.

    Layers under an adapter are among them (`PATH.base`). The output layer, what shares its weight with an embedding,
    layers within adapters, and those that `keep` names stay dense. strip: by a layer's dotted name and weight, what is
    to be stored of it. exchanged: called at once with the name and the new layer; whoever else holds the dense one
    keeps its weight from being freed. Raises ModelError for an unknown scheme, for a network that is quantized
    already, and for one that has no such layer.
    """
    done = next((path for path, module in network.named_modules() if isinstance(module, QuantizedLinear)), None)
    if done is not None:
        raise ModelError(f"{done}: is quantized already; load the model anew to quantize it")
    groups = _paths_to_quantize(network, keep)
    if not groups:
        raise ModelError(f"{type(network).__name__} has no linear layer to quantize; set quantize_base: none")
    for paths in groups:
        quantized = _quantized(network, paths[0], scheme, strip)
        for path in paths:
            network.set_submodule(path, quantized)
            if exchanged is not None:
                exchanged(path, quantized)
    return len(groups)


def _quantized(
    network: nn.Module, path: str, scheme: str, strip: Callable[[str, Tensor], Tensor] | None
) -> QuantizedLinear:
    layer = network.get_submodule(path)
    weight = strip(path, layer.get_parameter("weight")) if strip is not None else None
    return QuantizedLinear.of(layer, scheme, weight=weight)


def _paths_to_quantize(network: nn.Module, keep: Collection[str]) -> list[list[str]]:
    """The dotted names of each layer, several where the network has it in several places. No layer itself: what is
    listed could not be freed.
    """
    head = network.get_output_embeddings() if isinstance(network, PreTrainedModel) else None
    dense = set() if head is None else set(head.modules())
    dense |= {network.get_submodule(path) for path in keep}
    embedded = {module.weight for module in network.modules() if isinstance(module, nn.Embedding)}
    groups: defaultdict[int, list[str]] = defaultdict(list)
    for path, module in network.named_modules(remove_duplicate=False):
        within_network = path and ".adapters." not in f".{path}"
        if within_network and isinstance(module, nn.Linear) and not (module in dense or module.weight in embedded):
            groups[id(module)].append(path)
    return list(groups.values())
