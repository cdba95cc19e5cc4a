"""A network's frozen base stored in few bits, under whatever adapters it carries.

An adapter that starts from parts of a weight has them taken off before the weight is stored, and learns which layer it
sits on from then on. What an adapter trains a copy of stays dense.
"""

from functools import partial

from torch import Tensor, nn

from luthier.adapters.adapted import Adapted, AdaptedLinear
from luthier.quant.linear import QuantizedLinear, quantize_layers

__all__ = ["quantize_base", "quantized_as"]


def quantize_base(network: nn.Module, scheme: str) -> int:
    """Stores the weights of the linear layers as `scheme` says, but for the output layer's. Returns how many.

    Raises ModelError for a scheme that is not known, and where the network is quantized already.
    """
    carriers = {path: module for path, module in network.named_modules() if isinstance(module, Adapted)}
    linear = {f"{path}.base": carrier for path, carrier in carriers.items() if isinstance(carrier, AdaptedLinear)}
    dense = [path for path, carrier in linear.items() if not all(a.sees_rows for a in carrier.adapters.values())]
    count = quantize_layers(
        network, scheme, keep=dense, strip=partial(_stripped, linear), exchanged=partial(_move, linear)
    )
    _leave_the_file(network)
    return count


def _leave_the_file(network: nn.Module) -> None:
    """Copies what is frozen and still dense. Weights are mapped from their file, and one that stays there keeps all
    pages of it that were read, those of the weights that are quantized by now too.
    """
    for parameter in network.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.clone()


def _stripped(carriers: dict[str, AdaptedLinear], path: str, weight: Tensor) -> Tensor:
    for adapter in carriers[path].adapters.values() if path in carriers else ():
        weight = adapter.strip(weight)
    return weight


def _move(carriers: dict[str, AdaptedLinear], path: str, layer: QuantizedLinear) -> None:
    for adapter in carriers[path].adapters.values() if path in carriers else ():
        adapter.move(layer)


def quantized_as(network: nn.Module) -> str | None:
    """By which scheme the network's base is stored; None where it is dense."""
    found = (module.scheme for module in network.modules() if isinstance(module, QuantizedLinear))
    return next(found, None)
