"""Several adapters on one model: which apply, how much, and to which rows of a batch.

All of it is state of the modules that carry adapters; no weight changes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from luthier.adapters.adapted import AdaptedLinear, put_back
from luthier.adapters.inject import adapted_layers
from luthier.errors import AdapterError
from luthier.recipe.problems import unknown

__all__ = ["activate", "adapter_names", "adapters_off", "assign_rows", "delete_adapter", "mix_adapters"]


def adapter_names(network: nn.Module) -> list[str]:
    """The names of the adapters that the model carries, the first injected first."""
    return list(dict.fromkeys(name for layer in adapted_layers(network).values() for name in layer.adapters))


def activate(network: nn.Module, *names: str) -> None:
    """Lets these adapters apply, one around the other in this order, and no others; with no name, the base alone.

    Raises AdapterError for a name that the model does not carry.
    """
    mix_adapters(network, dict.fromkeys(names, 1.0))


def mix_adapters(network: nn.Module, shares: Mapping[str, float]) -> None:
    """Lets these adapters apply, each by its share: h <- h + share * (adapter(h) - h). A share of 1 is the whole.

    Raises AdapterError for a name that the model does not carry, and for a share other than 1 of an adapter that is
    not on linear layers alone.
    """
    _check(network, shares)
    layers = adapted_layers(network)
    for path, layer in layers.items():
        for name, share in shares.items():
            if share != 1 and name in layer.adapters and not isinstance(layer, AdaptedLinear):
                raise AdapterError(
                    f'{path}: the adapter "{name}" is not on linear layers alone; its share can only be 1'
                )
    for layer in layers.values():
        layer.active = tuple(name for name in shares if name in layer.adapters)
        layer.shares = {name: float(share) for name, share in shares.items()}


def delete_adapter(network: nn.Module, name: str) -> None:
    """Takes one adapter off the model; a module without any is again what it was before. Raises AdapterError for a
    name that the model does not carry.
    """
    _check(network, [name])
    for layer in adapted_layers(network).values():
        if name in layer.adapters:
            del layer.adapters[name]
            layer.active = tuple(other for other in layer.active if other != name)
            layer.shares.pop(name, None)
    put_back(network, [layer for layer in adapted_layers(network).values() if not layer.adapters])


def _check(network: nn.Module, names: Sequence[str] | Mapping[str, float]) -> None:
    present = adapter_names(network)
    for name in names:
        if name not in present:
            raise AdapterError(unknown("adapter", name, present) if present else "the model carries no adapter")


@contextmanager
def adapters_off(network: nn.Module) -> Iterator[None]:
    """The base model, for the time of the context: what a reference model is."""
    layers = list(adapted_layers(network).values())
    before = [layer.active for layer in layers]
    for layer in layers:
        layer.active = ()
    try:
        yield
    finally:
        for layer, names in zip(layers, before, strict=True):
            layer.active = names


@contextmanager
def assign_rows(
    network: nn.Module, names: Sequence[str | None], *, lengths: Sequence[int] | None = None
) -> Iterator[None]:
    """For the time of the context, each row of a batch has an adapter of its own, or none.

    names: one for each row. lengths: where the rows lie end to end in one stream, their tokens. Raises AdapterError for
    a name that the model does not carry, for a single row without `lengths`, and for adapters that are not on linear
    layers alone: those change the whole batch.
    """
    _check(network, [name for name in names if name is not None])
    if len(names) == 1 and lengths is None:
        raise AdapterError("a batch of one row needs no assignment; activate its adapter instead")
    layers = adapted_layers(network)
    for path, layer in layers.items():
        if not isinstance(layer, AdaptedLinear) and set(layer.adapters) & set(names):
            raise AdapterError(f"{path}: carries an adapter that cannot serve single rows; give its rows a batch alone")
    owners = [i for i, n in enumerate(lengths or [1] * len(names)) for _ in range(n)]
    rows = tuple(
        (name, torch.tensor([i for i, owner in enumerate(owners) if names[owner] == name]).to(_device(network)))
        for name in dict.fromkeys(names)
    )
    try:
        for layer in layers.values():
            layer.rows = rows
        yield
    finally:
        for layer in layers.values():
            layer.rows = ()


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device
