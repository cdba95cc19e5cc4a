"""Which modules of a model an adapter is put on.

Names are matched as PEFT matches them: a name in the list fits a module whose dotted name is it or ends in ".name". The
word `all-linear` means every linear layer of the transformer body; the output layer is not one of them. A name that
fits nothing is an error that lists the nearest real ones. Names are those of the model without adapters, however many
it carries.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import nn

from luthier.adapters.adapted import bare
from luthier.errors import AdapterError

__all__ = ["Linear", "decoder", "decoder_blocks", "linear_targets", "modules_named", "named_places", "output_layer"]

_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)(?:\.|$)")


@runtime_checkable
class Linear(Protocol):
    """A linear layer, dense or quantized."""

    in_features: int
    out_features: int


def named_places(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules of the model by their names without adapters; where adapters sit, the module that carries them."""
    yield from _walk(network, "")


def _walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    yield name, module
    for child_name, child in bare(module).named_children():
        yield from _walk(child, f"{name}.{child_name}" if name else child_name)


def linear_targets(
    network: nn.Module, names: str | Sequence[str], layers: Sequence[int] | None = None
) -> dict[str, nn.Module]:
    """The linear layers that `target_modules` names, within these blocks, by dotted name; dense or quantized ones.

    Raises AdapterError for a name that fits none, and for a block that is not there.
    """
    head = output_layer(network)
    places = [(name, place) for name, place in named_places(network) if isinstance(bare(place), Linear)]
    linears: dict[str, nn.Module] = {name: bare(place) for name, place in places if place is not head}
    if not linears:
        raise AdapterError(
            f"target_modules: {type(network).__name__} has no linear layer to adapt; choose another type"
        )
    if not isinstance(names, str):
        _refuse_head(next((name for name, place in places if place is head), ""), names)
    chosen = linears if isinstance(names, str) else _named(linears, names)
    return chosen if layers is None else _within(chosen, layers)


def output_layer(network: nn.Module) -> nn.Module | None:
    """What makes logits of hidden states, or a reward: of transformers' sequence classifiers their `score`."""
    found: nn.Module | None = network.get_output_embeddings()  # type: ignore[operator]
    return dict(network.named_children()).get("score") if found is None else found


def _refuse_head(head: str, names: Sequence[str]) -> None:
    """Raises AdapterError where one of these names means the output layer."""
    for name in names:
        if f".{head}".endswith(f".{name}"):
            raise AdapterError(f"target_modules: {name} is the output layer, which is not adapted; set modules_to_save")


def modules_named(network: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Modules of any kind by the ends of their names. Raises AdapterError for a name that fits none."""
    return _named({name: bare(module) for name, module in named_places(network) if name}, names)


def _named(modules: Mapping[str, nn.Module], names: Sequence[str]) -> dict[str, nn.Module]:
    chosen: set[str] = set()
    for wanted in names:
        fitting = {name for name in modules if name == wanted or name.endswith(f".{wanted}")}
        if not fitting:
            raise AdapterError(_unknown(wanted, modules))
        chosen |= fitting
    return {name: module for name, module in modules.items() if name in chosen}


def _unknown(wanted: str, modules: Mapping[str, nn.Module]) -> str:
    short = sorted({name.rpartition(".")[2] for name in modules if not name.rpartition(".")[2].isdigit()})
    nearest = difflib.get_close_matches(wanted, short, n=1, cutoff=0.5)
    hint = f'did you mean "{nearest[0]}"? ' if nearest else ""
    kind = "linear layer" if all(isinstance(module, Linear) for module in modules.values()) else "module"
    return f'target_modules: no {kind} is named "{wanted}"; {hint}this model has {", ".join(short)}'


def _within(chosen: Mapping[str, nn.Module], layers: Sequence[int]) -> dict[str, nn.Module]:
    numbers = {name: int(found[1]) for name in chosen if (found := _BLOCK.search(name))}
    if missing := sorted(set(layers) - set(numbers.values())):
        last = max(numbers.values(), default=-1)
        raise AdapterError(f"layers_to_transform: there is no block {missing[0]}; this model has 0 to {last}")
    return {name: module for name, module in chosen.items() if numbers.get(name) in layers}


def decoder_blocks(network: nn.Module) -> dict[str, nn.Module]:
    """The model's repeated blocks, in order, by dotted name."""
    blocks = {}
    for name, module in named_places(network):
        found = _BLOCK.search(name)
        if found and name.endswith(f".{found[1]}"):
            blocks[name] = bare(module)
    return blocks


def decoder(network: nn.Module) -> tuple[str, nn.Module]:
    """The transformer's body, with the adapters that it carries, and its dotted name. transformers' own `get_decoder`
    looks through them and gives the body alone.
    """
    body = bare(network.get_decoder())  # type: ignore[operator]
    return next((name, place) for name, place in named_places(network) if bare(place) is body)
