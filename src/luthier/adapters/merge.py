"""Adapters merged into their layers, so that the model is an ordinary one again.

Here a network in memory is merged; the weights of a stored model are merged by `models/merge.py`, without loading it.
"""

import torch
from torch import Tensor, nn

from luthier.adapters.inject import adapted_layers
from luthier.errors import AdapterError

__all__ = ["merge_adapters", "refuse_new_bias", "remove_adapters"]


def merge_adapters(network: nn.Module) -> int:
    """Writes each layer's active adapters into its weight and puts the plain layer back. Returns how many were
    merged.

    Raises AdapterError, with the network as it was, if an adapter is switched off: it would be lost. Raises it too at
    a layer whose adapter cannot be merged; the network then still computes what it did.
    """
    layers = adapted_layers(network)
    for path, layer in layers.items():
        if idle := [name for name in layer.adapters if name not in layer.active]:
            raise AdapterError(
                f'{path}: the adapter "{idle[0]}" is switched off, so merging would lose it; switch it on or remove it'
            )
    with torch.no_grad():
        for path, layer in layers.items():
            weight, bias = layer.merged()
            refuse_new_bias(path, layer.bias, bias)
            layer.base.weight.copy_(weight)
            if bias is not None:
                layer.base.bias.copy_(bias)
            network.set_submodule(path, layer.base)
    return len(layers)


def refuse_new_bias(path: str, before: Tensor | None, after: Tensor | None) -> None:
    """Raises AdapterError if merging gave a bias to a layer whose architecture has none: loading would drop it."""
    if before is None and after is not None:
        raise AdapterError(
            f"{path}: merging gives this layer a bias, and the model's architecture has none there; keep the adapter "
            "beside the model"
        )


def remove_adapters(network: nn.Module) -> None:
    """Puts the plain layers back, bit for bit as they were before injection."""
    for path, layer in adapted_layers(network).items():
        network.set_submodule(path, layer.base)
