"""Adapters merged into their layers, so that the model is an ordinary one again.

Here a network in memory is merged; the weights of a stored model are merged by `models/merge.py`, without loading it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy

import torch
from torch import Tensor, nn

from luthier.adapters.adapted import Adapted, AdaptedLinear, put_back
from luthier.adapters.base import Adapter
from luthier.adapters.inject import adapted_layers
from luthier.adapters.new_tokens import TokenRows
from luthier.adapters.switch import refuse_rows
from luthier.adapters.targets import Linear
from luthier.errors import AdapterError

__all__ = [
    "adapters_merged",
    "can_be_merged",
    "merge_adapters",
    "refuse_new_bias",
    "refuse_unmergeable",
    "remove_adapters",
]


def merge_adapters(network: nn.Module) -> int:
    """Writes each layer's active adapters into its weight and puts the plain layer back; a quantized layer becomes a
    dense one. Returns how many were merged.

    Raises AdapterError, with the network as it was, if an adapter is switched off: it would be lost. Raises it too at
    a module whose adapter cannot be merged; the network then still computes what it did.
    """
    layers = adapted_layers(network)
    for path, layer in layers.items():
        if idle := [name for name in layer.adapters if name not in layer.active]:
            raise AdapterError(
                f'{path}: the adapter "{idle[0]}" is switched off, so merging would lose it; switch it on or remove it'
            )
        _refuse_longer(path, layer)
    with torch.no_grad():
        for path, layer in layers.items():
            _merge(path, layer)
            put_back(network, [layer])
    return len(layers)


def _refuse_longer(path: str, layer: Adapted) -> None:
    if any(isinstance(adapter, TokenRows) and adapter.adds_rows for adapter in layer.adapters.values()):
        raise AdapterError(
            f"{path}: rows of new tokens cannot be merged in memory, where the layer has no room for them; merge the "
            "stored model (`luthier merge`, or `save` in Python)"
        )


@contextmanager
def adapters_merged(network: nn.Module) -> Iterator[None]:
    """The active adapters merged for the time of the context, so that the model is as fast as its base.

    Afterwards the layers are what they were, bit for bit, because the originals are kept: it takes as much memory as
    the adapted weights. Modules whose adapters cannot be merged go on applying them. Raises AdapterError while rows
    have adapters of their own.
    """
    refuse_rows(network)
    exchanged: list[tuple[Adapted, nn.Module, tuple[str, ...]]] = []
    try:
        with torch.no_grad():
            for layer in adapted_layers(network).values():
                if layer.active and all(layer.adapters[name].mergeable for name in layer.active):
                    before = (layer, layer.base, layer.active)
                    layer.base, layer.active = _plain(layer.base, *layer.merged()), ()
                    exchanged.append(before)
        yield
    finally:
        for layer, base, active in exchanged:
            layer.base, layer.active = base, active


def _merge(path: str, layer: Adapted) -> None:
    weight, bias = layer.merged()
    refuse_new_bias(path, getattr(layer.base, "bias", None), bias)
    if isinstance(layer, AdaptedLinear) and not isinstance(layer.base, nn.Linear):
        layer.base = _plain(layer.base, weight, bias)
        return
    layer.base.weight.copy_(weight)
    if bias is not None:
        layer.base.bias.copy_(bias)


def _plain(base: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A module as `base` with these parameters; of a quantized layer, a dense one."""
    parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    parameters |= {} if bias is None else {"bias": nn.Parameter(bias, requires_grad=False)}
    if isinstance(base, Linear) and "weight" not in base._parameters:
        base = nn.Linear(base.in_features, base.out_features, bias=bias is not None, device="meta").train(base.training)
    plain = copy(base)
    plain._parameters = {**base._parameters, **parameters}
    return plain


def refuse_new_bias(path: str, before: Tensor | None, after: Tensor | None) -> None:
    """Raises AdapterError if merging gave a bias to a layer whose architecture has none: loading would drop it."""
    if before is None and after is not None:
        raise AdapterError(
            f"{path}: merging gives this layer a bias, and the model's architecture has none there; keep the adapter "
            "beside the model and name both (--model, --adapter)"
        )


def can_be_merged(network: nn.Module) -> bool:
    """Whether every adapter of the network can become a part of the weights."""
    layers = adapted_layers(network).values()
    return all(adapter.mergeable for layer in layers for adapter in layer.adapters.values())


def refuse_unmergeable(adapters: Sequence[Adapter]) -> None:
    """Raises AdapterError if one of these can never become a part of the weights, on which a next stage would train."""
    stuck = next((adapter for adapter in adapters if not adapter.mergeable), None)
    if stuck is not None:
        raise AdapterError(
            f"{stuck.name}: an adapter of type {stuck.settings.type} cannot be merged here, and a stage follows, which "
            "would train on it; make this the last stage or choose another type"
        )


def remove_adapters(network: nn.Module) -> None:
    """Puts the plain modules back, bit for bit as they were before injection."""
    put_back(network, adapted_layers(network).values())
