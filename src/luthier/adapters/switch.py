"""Several adapters on one model: which apply, how much, and to which rows of a batch.

All of it is state of the modules that carry adapters; no weight changes. What a context sets, it takes back: of several
within each other the innermost counts. Nothing is switched while adapters are merged into the weights.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from luthier.adapters.adapted import Adapted, Rows, put_back, refuse_stripped
from luthier.adapters.inject import adapted_layers
from luthier.errors import AdapterError
from luthier.recipe.problems import unknown

__all__ = [
    "activate",
    "adapter_names",
    "adapters_off",
    "adapters_on",
    "assign_rows",
    "delete_adapter",
    "mix_adapters",
    "refuse_rows",
]


def adapter_names(network: nn.Module) -> list[str]:
    """The names of the adapters that the model carries, the first injected first."""
    return list(dict.fromkeys(name for layer in adapted_layers(network).values() for name in layer.adapters))


def activate(network: nn.Module, *names: str) -> None:
    """Lets these adapters apply, one around the other in this order, and no others; with no name, the base alone.

    Raises AdapterError for a name that the model does not carry, and where `mix_adapters` does.
    """
    mix_adapters(network, dict.fromkeys(names, 1.0))


def mix_adapters(network: nn.Module, shares: Mapping[str, float]) -> None:
    """Lets these adapters apply, each by its share: h <- h + share * (adapter(h) - h). A share of 1 is the whole.

    Raises AdapterError for a name that the model does not carry, for a share that is not finite, for one other than 1
    of an adapter that is not on linear layers alone, and while rows have adapters of their own.
    """
    layers = _switchable(network, shares)
    refuse_rows(network)
    for name, share in shares.items():
        if not math.isfinite(share):
            raise AdapterError(f'the share of the adapter "{name}" is {share}; give a finite number')
    for path, layer in layers.items():
        for name, share in shares.items():
            if share != 1 and name in layer.adapters and not layer.adapters[name].sees_rows:
                raise AdapterError(
                    f'{path}: the adapter "{name}" is not on linear layers alone; its share can only be 1'
                )
    for layer in layers.values():
        layer.active = tuple(name for name in shares if name in layer.adapters)
        layer.shares = {name: float(share) for name, share in shares.items()}


def delete_adapter(network: nn.Module, name: str) -> None:
    """Takes one adapter off the model; a module without any is again what it was before.

    Raises AdapterError for a name that the model does not carry, and for an adapter that started from parts of weights
    which were quantized without these.
    """
    layers = [layer for layer in _switchable(network, [name]).values() if name in layer.adapters]
    refuse_stripped(layer.adapters[name] for layer in layers)
    for layer in layers:
        del layer.adapters[name]
        layer.active = tuple(other for other in layer.active if other != name)
        layer.shares.pop(name, None)
    put_back(network, [layer for layer in layers if not layer.adapters])


def _switchable(network: nn.Module, names: Sequence[str] | Mapping[str, float] = ()) -> dict[str, Adapted]:
    """The modules that carry adapters, these among them. Raises AdapterError, also while adapters are merged."""
    present, layers = adapter_names(network), adapted_layers(network)
    for name in names:
        if name not in present:
            raise AdapterError(unknown("adapter", name, present) if present else "the model carries no adapter")
    for path, layer in layers.items():
        if layer.is_merged:
            raise AdapterError(f"{path}: its adapters are merged into its weight; leave adapters_merged first")
    return layers


def refuse_rows(network: nn.Module) -> None:
    """Raises AdapterError while the rows of a batch have adapters of their own."""
    if any(layer.rows is not None for layer in adapted_layers(network).values()):
        raise AdapterError("the rows of a batch have adapters of their own; leave assign_rows first")


@contextmanager
def adapters_off(network: nn.Module) -> Iterator[None]:
    """The base model, for the time of the context: what a reference model is. Raises AdapterError while adapters are
    merged.
    """
    with adapters_on(network):
        yield


@contextmanager
def adapters_on(network: nn.Module, *names: str) -> Iterator[None]:
    """For the time of the context, these adapters and no others apply, one around the other, to all rows. Raises
    AdapterError for a name that the model does not carry, and while adapters are merged.
    """
    layers = list(_switchable(network, names).values())
    with _afterwards_as_before(layers):
        for layer in layers:
            layer.active = tuple(name for name in names if name in layer.adapters)
            layer.shares, layer.rows = {}, None
        yield


@contextmanager
def assign_rows(
    network: nn.Module, names: Sequence[str | None], *, lengths: Sequence[int] | None = None
) -> Iterator[None]:
    """For the time of the context, each row of a batch has an adapter of its own, or none. It applies wholly.

    names: one for each row. lengths: where the rows lie end to end in one stream, their tokens. Raises AdapterError for
    a name that the model does not carry, for more or fewer names than rows, for adapters that are not on linear layers
    alone, whether named or active, for they change the whole batch, and while adapters are merged.
    """
    layers = _switchable(network, [name for name in names if name is not None])
    _refuse_whole_batch(layers, names)
    rows = _rows(names, lengths, next(network.parameters()).device)
    with _afterwards_as_before(list(layers.values())):
        for layer in layers.values():
            layer.rows = rows
        yield


def _refuse_whole_batch(layers: Mapping[str, Adapted], names: Sequence[str | None]) -> None:
    for path, layer in layers.items():
        for name, adapter in layer.adapters.items():
            if adapter.sees_rows:
                continue
            if name in names:
                raise AdapterError(f'{path}: the adapter "{name}" cannot serve single rows; give it a batch of its own')
            if name in layer.active:
                raise AdapterError(f'{path}: the adapter "{name}" is active and changes all rows; switch it off first')


def _rows(names: Sequence[str | None], lengths: Sequence[int] | None, device: torch.device) -> Rows:
    if not names or (lengths is not None and len(lengths) != len(names)):
        num_rows = "no row" if lengths is None else f"{len(lengths)} lengths"
        raise AdapterError(f"assign_rows: {len(names)} names for {num_rows}; name an adapter, or None, for each row")
    owners = [name for name, length in zip(names, lengths or [1] * len(names), strict=True) for _ in range(length)]
    numbers = {name: [i for i, owner in enumerate(owners) if owner == name] for name in dict.fromkeys(owners)}
    places = {name: torch.tensor(own, device=device) for name, own in numbers.items()}
    return Rows(places, len(owners), in_stream=lengths is not None)


@contextmanager
def _afterwards_as_before(layers: Sequence[Adapted]) -> Iterator[None]:
    """Which adapters apply is afterwards what it was before, but for those that were deleted."""
    before = [(layer.active, layer.shares, layer.rows) for layer in layers]
    try:
        yield
    finally:
        for layer, (active, shares, rows) in zip(layers, before, strict=True):
            layer.active = tuple(name for name in active if name in layer.adapters)
            layer.shares, layer.rows = shares, rows
