"""Adapters merged into their layers, so that the model is an ordinary one again."""

import torch
from torch import nn

from luthier.adapters.inject import adapted_layers

__all__ = ["merge_adapters", "remove_adapters"]


def merge_adapters(network: nn.Module) -> int:
    """Writes each layer's active adapters into its weight and puts the plain layer back. Returns how many were
    merged.
    """
    layers = adapted_layers(network)
    with torch.no_grad():
        for layer in layers.values():
            weight, bias = layer.merged()
            layer.base.weight.copy_(weight)
            if bias is not None:
                layer.base.bias = nn.Parameter(bias, requires_grad=False)
    remove_adapters(network)
    return len(layers)


def remove_adapters(network: nn.Module) -> None:
    """Puts the plain layers back, bit for bit as they were before injection."""
    for path, layer in adapted_layers(network).items():
        network.set_submodule(path, layer.base)
