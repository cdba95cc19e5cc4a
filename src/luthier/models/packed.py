"""A network's linear layers in fewer bytes, for the time of a generation.

A step of generation reads every weight for a few tokens, so bytes are its time. On a CPU, half the bytes are had by
float16 (11 bits of mantissa; products and sums in float32, by FBGEMM's kernel, which PyTorch brings), a quarter by int8
with a scale for each output and inputs in bfloat16. float16 is as good as exact, KL 1e-6 a token for a model of 135
million parameters, and int8 is not: KL 1e-2. Inputs in int8 as well would be faster still, at a KL of 1. What many
tokens pass through, as prompts do, is computed by the layers as they are.
"""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from luthier.adapters.adapted import Adapted, Layer, bare
from luthier.adapters.merge import adapters_merged
from luthier.adapters.targets import Linear, named_places
from luthier.errors import RecipeError
from luthier.kernels.linear import has_onednn, whole_product

__all__ = ["PACKED", "Packing", "can_pack", "stored_bytes", "versions_of"]

MOST_ROWS = 64  # for more, a product is bound by its operations, and the dense layer is as fast
_BLOCK = 512  # inputs
_INT8_MULTIPLE = 32  # inputs; for others the kernel reads beyond the weight


class PackedLinear(nn.Module):
    """x W^T + b, W in few bytes for a few rows, and as `dense` has it for many. form: of FORMS."""

    takes_onto = True

    def __init__(self, dense: Any, form: str) -> None:
        super().__init__()
        self.dense, self.in_features, self.out_features = dense, dense.in_features, dense.out_features
        self.multiply = FORMS[form](dense.weight.detach(), dense.bias)
        self.most_rows = MOST_ROWS if form in PACKED else sys.maxsize
        self.made_of = versions_of(dense)

    @property
    def weight(self) -> Tensor:
        """As `dense` has it, [out, in], for adapters that read it."""
        weight: Tensor = self.dense.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """As `dense` has it, [out]."""
        bias: Tensor | None = self.dense.bias
        return bias

    @property
    def is_current(self) -> bool:
        """Whether nothing was written into the layer since this was made of it."""
        return self.made_of == versions_of(self.dense)

    def forward(self, x: Tensor, *, onto: Tensor | None = None) -> Tensor:
        """x: [..., in] -> [..., out]; with `onto`, [tokens, out], added to it, perhaps where it lies."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) > self.most_rows:
            return Layer(self.dense)(x, onto=onto)
        if onto is not None:
            return onto.add_(self.multiply(rows))
        product: Tensor = self.multiply(rows).to(x.dtype)
        return product.view(*x.shape[:-1], product.shape[-1])  # merged new tokens make it longer than the layer says


def _by_float16(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Inputs that are not packed stay as they are, in float32."""
    num_packed = _packed_inputs(weight.shape[1])
    wide = None if bias is None else bias.float()
    stored = torch.ops.quantized.linear_prepack_fp16(weight[:, :num_packed].float().contiguous(), wide)
    if num_packed == weight.shape[1]:
        return lambda x: torch.ops.quantized.linear_dynamic_fp16(x.float(), stored)
    others = weight[:, num_packed:].T.float().contiguous()

    def multiply(x: Tensor) -> Tensor:
        x = x.float()
        product: Tensor = torch.ops.quantized.linear_dynamic_fp16(x[:, :num_packed].contiguous(), stored)
        return product.addmm_(x[:, num_packed:], others)

    return multiply


def _packed_inputs(num_inputs: int) -> int:
    """How many are stored in float16, as 512 of 576: FBGEMM stores a begun block whole, so a little of it is not."""
    whole = num_inputs // _BLOCK * _BLOCK
    return whole if whole and num_inputs - whole <= _BLOCK // 4 else num_inputs


def _by_int8(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    scales = weight.float().abs().amax(1).clamp_(min=1e-12).div_(127)
    codes = weight.float().div(scales[:, None]).round_().to(torch.int8)
    ones, added = torch.ones_like(scales, dtype=torch.bfloat16), 0.0 if bias is None else bias.float()
    missing = -codes.shape[1] % _INT8_MULTIPLE
    codes = pad(codes, (0, missing))
    return lambda x: torch._weight_int8pack_mm(pad(x.bfloat16(), (0, missing)), codes, ones).float() * scales + added


def _dense(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    return lambda x: whole_product(x, weight, bias)


PACKED: dict[str, Callable[[Tensor, Tensor | None], Callable[[Tensor], Tensor]]] = {
    "fp16": _by_float16,
    "int8": _by_int8,
}
"""From weight [out, in] and bias to x -> x W^T + b in float32, x: [rows, in]."""

FORMS = {"dense": _dense, **PACKED}


def stored_bytes(form: str, num_outputs: int, num_inputs: int) -> int:
    """What a layer's weight takes in this form besides the layer itself."""
    if form == "fp16":
        packed = _packed_inputs(num_inputs)
        whole = packed if packed < num_inputs else -(-packed // _BLOCK) * _BLOCK
        return num_outputs * (2 * whole + 4 * (num_inputs - packed))
    return num_outputs * (num_inputs + -num_inputs % _INT8_MULTIPLE) if form == "int8" else 0


class Packing:
    """A network's linear layers in one form. What is frozen is stored once and kept for the next time."""

    def __init__(self, network: PreTrainedModel, form: str, *, fixed: bool = False) -> None:
        """form: dense, or one of PACKED. fixed: nobody trains the network, whatever of it could be. Raises RecipeError
        where this form cannot be had.
        """
        if form != "dense":
            _refuse(network, form)
        self.network, self.form, self.fixed = network, form, fixed
        self.kept: dict[str, PackedLinear] = {}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """For the time of the context the network is stored so; afterwards its layers are what they were, bit for bit.

        dense: adapters are merged for the while. Else they stay as they are, over layers in few bytes: to store all
        merged layers anew takes as long as some hundred steps of what they add.
        """
        with adapters_merged(self.network) if self.form == "dense" else nullcontext():
            layers = {} if self.form == "dense" and not _by_onednn(self.network) else _dense_layers(self.network)
            with self._exchanged(layers):
                yield

    @contextmanager
    def _exchanged(self, layers: dict[str, nn.Module]) -> Iterator[None]:
        try:
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                stored = list(pool.map(self._stored, layers.items()))
            for path, one in zip(layers, stored, strict=True):
                _exchange(self.network, path, one)
            yield
        finally:
            for path, layer in layers.items():
                _exchange(self.network, path, layer)

    def _stored(self, place: tuple[str, nn.Module]) -> PackedLinear:
        path, layer = place
        kept = self.kept.get(path)
        if kept is not None and kept.dense is layer and kept.is_current:
            return kept
        with torch.inference_mode():
            made = PackedLinear(layer, self.form).eval()
        if self._can_be_kept(layer):
            self.kept[path] = made
        return made

    def _can_be_kept(self, layer: nn.Module) -> bool:
        """Not what is trained, for PyTorch's fused optimizer leaves no trace of what it writes; nor in the dense form,
        where making costs nothing, and what is made of merged weights would hold on to them.
        """
        trained = not self.fixed and any(parameter.requires_grad for parameter in layer.parameters())
        return self.form in PACKED and not trained


def _by_onednn(network: PreTrainedModel) -> bool:
    return network.device.type == "cpu" and has_onednn(network.dtype)


def can_pack(network: PreTrainedModel) -> bool:
    """Whether weights can be had in few bytes where the network is."""
    return network.device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines


def _refuse(network: PreTrainedModel, form: str) -> None:
    if not can_pack(network):
        raise RecipeError(f"rollout_weights: {form} is had on x86 CPUs alone; choose dense")


def versions_of(layer: nn.Module) -> list[tuple[int, int]]:
    """Where each of its tensors lies, and how often it was written into."""
    tensors = (*layer.parameters(), *layer.buffers())
    return [(t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors]


def _dense_layers(network: PreTrainedModel) -> dict[str, nn.Module]:
    """Linear layers, without the adapters on them; not those that an adapter computes otherwise than by calling them,
    as a copy of the whole layer does.
    """
    places = {path: place for path, place in named_places(network) if isinstance(bare(place), Linear)}
    return {path: bare(place) for path, place in places.items() if not _is_replaced(place)}


def _is_replaced(place: nn.Module) -> bool:
    return isinstance(place, Adapted) and any(not place.adapters[name].sees_rows for name in place.active)


def _exchange(network: PreTrainedModel, path: str, layer: nn.Module) -> None:
    """Puts a layer in its place, under the adapters that are on it, which then sit on this one."""
    place = network.get_submodule(path)
    if isinstance(place, Adapted):
        for adapter in place.adapters.values():
            if adapter.place is place.base:  # else it is merged into that
                adapter.move(layer)
        place.base = layer
    else:
        parent, _, name = path.rpartition(".")
        setattr(bare(network.get_submodule(parent)), name, layer)
