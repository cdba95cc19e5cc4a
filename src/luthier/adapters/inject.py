"""Adapters put into a model, switched, and taken out again.

Target names are matched as PEFT matches them: a name in the list fits a layer whose dotted name is it or ends in
".name". The word `all-linear` means every linear layer of the transformer body; the output layer is not one of them.
A name that fits nothing is an error that lists the nearest real ones.
"""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from luthier.adapters.base import AdaptedLinear, Adapter
from luthier.adapters.lora import LoRA
from luthier.errors import AdapterError
from luthier.recipe.adapters import AdapterSettings

__all__ = ["ADAPTERS", "DEFAULT_NAME", "adapted_layers", "adapter_parameters", "adapters_off", "inject", "targets"]

ADAPTERS: dict[str, type[Adapter]] = {"lora": LoRA}

DEFAULT_NAME = "default"


def targets(network: nn.Module, names: str | tuple[str, ...]) -> dict[str, nn.Linear]:
    """The linear layers that `target_modules` names, by dotted name. Raises AdapterError for a name that fits none."""
    head = network.get_output_embeddings() if isinstance(network, nn.Module) else None  # type: ignore[operator]
    linears = {name: layer for name, layer in _linears(network) if layer is not head}
    if isinstance(names, str):
        return linears
    chosen: dict[str, nn.Linear] = {}
    for wanted in names:
        fitting = {n: m for n, m in linears.items() if n == wanted or n.endswith(f".{wanted}")}
        if not fitting:
            raise AdapterError(_unknown_target(wanted, linears))
        chosen |= fitting
    return {name: layer for name, layer in linears.items() if name in chosen}


def _linears(network: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in network.named_modules():
        if isinstance(module, AdaptedLinear):
            yield name, module.base
        elif isinstance(module, nn.Linear) and not name.endswith(".base"):
            yield name, module


def _unknown_target(wanted: str, linears: dict[str, nn.Linear]) -> str:
    short = sorted({name.rpartition(".")[2] for name in linears})
    nearest = difflib.get_close_matches(wanted, short, n=1, cutoff=0.5)
    hint = f'did you mean "{nearest[0]}"? ' if nearest else ""
    return f'target_modules: no linear layer is named "{wanted}"; {hint}this model has {", ".join(short)}'


def inject(network: nn.Module, settings: AdapterSettings, *, seed: int, name: str = DEFAULT_NAME) -> list[Adapter]:
    """Puts an adapter on every target layer, active besides those that are. The rest of the network stays as it is.

    The start values of a layer depend on the seed and on the layer's name alone, not on the order of injection.
    Raises AdapterError for unknown targets, a rank above a layer's size, or a name that is taken; the network is then
    left as it was.
    """
    chosen = targets(network, settings.target_modules)
    for path, present in adapted_layers(network).items():
        if path in chosen and name in present.adapters:
            raise AdapterError(
                f'{path}: an adapter named "{name}" is there already; choose another name or delete it first'
            )
    adapters = [ADAPTERS[settings.type](linear, settings, name=path) for path, linear in chosen.items()]
    for adapter in adapters:
        adapter.initialize(_generator(seed, adapter.name))
        layer = _adapted(network, adapter.name)
        layer.adapters[name] = adapter.train(layer.training)
        layer.active = (*layer.active, name)
    return adapters


def _adapted(network: nn.Module, path: str) -> AdaptedLinear:
    layer = network.get_submodule(path)
    if isinstance(layer, AdaptedLinear):
        return layer
    assert isinstance(layer, nn.Linear)
    adapted = AdaptedLinear(layer).train(layer.training)
    network.set_submodule(path, adapted)
    return adapted


def _generator(seed: int, path: str) -> torch.Generator:
    mixed = seed
    for byte in path.encode():
        mixed = (mixed * 1_000_003 + byte) % 2**63  # Python's own hash() differs from process to process
    return torch.Generator().manual_seed(mixed)


def adapted_layers(network: nn.Module) -> dict[str, AdaptedLinear]:
    """The layers that carry adapters, by the dotted name of the layer they stand for."""
    return {name: module for name, module in network.named_modules() if isinstance(module, AdaptedLinear)}


def adapter_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of all adapters, by dotted name."""
    return {n: p for n, p in network.named_parameters() if ".adapters." in n}


@contextmanager
def adapters_off(network: nn.Module) -> Iterator[None]:
    """The base model, for the time of the context: what a reference model is."""
    layers = list(adapted_layers(network).values())
    active = [layer.active for layer in layers]
    for layer in layers:
        layer.active = ()
    try:
        yield
    finally:
        for layer, names in zip(layers, active, strict=True):
            layer.active = names
