"""Adapters put into a model.

`ADAPTERS` says which class a type's word means. What the settings ask for besides (modules trained whole, biases, new
tokens) are adapters of their own on other modules, under the same name; so they are switched, saved and merged with it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from luthier.adapters.adalora import AdaLoRA
from luthier.adapters.adapted import Adapted, AdaptedLinear, bare
from luthier.adapters.adapter_fusion import AdapterFusion
from luthier.adapters.base import Adapter, Start, Step
from luthier.adapters.bottleneck import Bottleneck
from luthier.adapters.copies import BiasCopy, BitFit, ModuleCopy
from luthier.adapters.dora import DoRA
from luthier.adapters.dylora import DyLoRA
from luthier.adapters.ia3 import IA3
from luthier.adapters.loha import LoHa
from luthier.adapters.lokr import LoKr
from luthier.adapters.lora import LoRA
from luthier.adapters.new_tokens import TokenRows, numbered, tie_rows
from luthier.adapters.prefix import Prefix
from luthier.adapters.prompt import Prompt
from luthier.adapters.targets import Linear, modules_named, named_places
from luthier.adapters.vera import VeRA
from luthier.errors import AdapterError
from luthier.recipe.adapters import AnyAdapter

__all__ = [
    "ADAPTERS",
    "DEFAULT_NAME",
    "adapted_layers",
    "adapter_parameters",
    "after_step",
    "attach",
    "before_step",
    "build",
    "inject",
    "penalty",
    "rate_ratios",
    "share",
]

ADAPTERS: dict[str, type[Adapter]] = {
    "adalora": AdaLoRA,
    "bitfit": BitFit,
    "bottleneck": Bottleneck,
    "dora": DoRA,
    "dylora": DyLoRA,
    "fusion": AdapterFusion,
    "ia3": IA3,
    "loha": LoHa,
    "lokr": LoKr,
    "lora": LoRA,
    "prefix": Prefix,
    "prompt": Prompt,
    "vera": VeRA,
}

DEFAULT_NAME = "default"


def build(network: nn.Module, settings: AnyAdapter) -> list[Adapter]:
    """The adapters that the settings ask for, on no module yet. Raises AdapterError for what does not fit."""
    config = network.config.get_text_config()  # type: ignore[union-attr,operator]
    adapters = [kind(module, settings, name=path, config=config) for path, module, kind in _parts(network, settings)]
    tie_rows(adapters)
    return adapters


def _parts(network: nn.Module, settings: AnyAdapter) -> Iterator[tuple[str, nn.Module, type[Adapter]]]:
    kind = ADAPTERS[settings.type]
    own = kind.places(network, settings)
    yield from ((path, module, kind) for path, module in own.items())
    rows = TokenRows.places(network, settings)
    yield from ((path, module, TokenRows) for path, module in rows.items())
    whole = modules_named(network, settings.modules_to_save)
    _refuse_shared(network, whole)
    if doubly := sorted((own.keys() | rows.keys()) & whole.keys()):
        raise AdapterError(f"modules_to_save: {doubly[0]} carries the adapter already; leave it out of one of the two")
    yield from ((path, module, ModuleCopy) for path, module in whole.items())
    if settings.type == "bitfit" or getattr(settings, "bias", "none") == "all":
        for path, module in _other_biases(network, own.keys() | whole.keys()):
            if path in rows:
                raise AdapterError(f"{path}: its bias cannot be trained beside rows of tokens; set bias: none")
            yield path, module, BitFit if isinstance(module, Linear) else BiasCopy


def _refuse_shared(network: nn.Module, whole: Mapping[str, nn.Module]) -> None:
    """Raises AdapterError for a module whose weight is another's too: a copy would have to be merged into both."""
    users: dict[nn.Parameter, list[str]] = {}
    for path, place in named_places(network):
        for parameter in bare(place).parameters(recurse=False):
            users.setdefault(parameter, []).append(path)
    for path, module in whole.items():
        for parameter in module.parameters(recurse=False):
            if len(users[parameter]) > 1:
                other = next(user for user in users[parameter] if user != path)
                raise AdapterError(
                    f"modules_to_save: {path} shares its weight with {other}, so it cannot be trained alone; leave it "
                    "out, or train rows of it (new_tokens, trainable_token_indices)"
                )


def _other_biases(network: nn.Module, taken: set[str]) -> Iterator[tuple[str, nn.Module]]:
    for path, place in named_places(network):
        module = bare(place)
        if path not in taken and isinstance(module._parameters.get("bias"), Tensor):
            yield path, module


def inject(
    network: nn.Module,
    settings: AnyAdapter,
    *,
    seed: int,
    name: str = DEFAULT_NAME,
    rounding: Callable[[Tensor], Tensor] | None = None,
    encode: Callable[[str], list[int]] | None = None,
) -> list[Adapter]:
    """Puts an adapter on every module that the settings mean, active besides those that are. All else stays as it is.

    The start values of a module depend on the seed and on the module's name alone, not on the order of injection.
    rounding: what quantizing the base will make of a weight, if that is to follow. encode: for settings with texts.
    Raises AdapterError for unknown targets, a rank above a layer's size, or a name that is taken; the network is then
    left as it was.
    """
    adapters = build(network, numbered(settings, network))
    share(adapters, network, {})
    for adapter in adapters:
        adapter.initialize(Start(_generator(seed, adapter.name), network, rounding, encode))
    attach(network, adapters, name)
    return adapters


def attach(network: nn.Module, adapters: Sequence[Adapter], name: str) -> None:
    """Puts built adapters on their modules, active besides those that are. Raises AdapterError for a name that is
    taken, with the network as it was.
    """
    places = dict(named_places(network))
    for adapter in adapters:
        place = places[adapter.name]
        if isinstance(place, Adapted) and name in place.adapters:
            raise AdapterError(
                f'{adapter.name}: an adapter named "{name}" is there already; choose another name or delete it first'
            )
    paths = {module: path for path, module in network.named_modules()}
    for adapter in sorted(adapters, key=lambda adapter: -paths[adapter.place].count(".")):  # inner modules first
        adapted = places[adapter.name]
        if not isinstance(adapted, Adapted):
            kind = AdaptedLinear if isinstance(adapter.place, Linear) else Adapted
            adapted = kind(adapter.place).train(adapter.place.training)
            network.set_submodule(paths[adapter.place], adapted)
        adapted.adapters[name] = adapter.train(adapted.training)
        adapted.active = (*adapted.active, name)


def _generator(seed: int, path: str) -> torch.Generator:
    mixed = seed
    for byte in path.encode():
        mixed = (mixed * 1_000_003 + byte) % 2**63  # Python's own hash() differs from process to process
    return torch.Generator().manual_seed(mixed)


def adapted_layers(network: nn.Module) -> dict[str, Adapted]:
    """The modules that carry adapters, by the dotted name of the module they stand for."""
    return {name: module for name, module in named_places(network) if isinstance(module, Adapted)}


def adapter_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of all adapters, by dotted name."""
    return {n: p for n, p in network.named_parameters() if ".adapters." in n}


def rate_ratios(network: nn.Module) -> dict[str, float]:
    """By what the learning rate of an adapter's parameter is multiplied, by dotted name, where that is not 1."""
    adapters = [(path, module) for path, module in network.named_modules() if isinstance(module, Adapter)]
    found = {f"{path}.{name}": ratio for path, a in adapters for name, ratio in a.rate_ratios().items()}
    return {name: ratio for name, ratio in found.items() if ratio != 1}


def share(adapters: Sequence[Adapter], network: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Gives the adapters of each type what they have in common. stored: the file that they are read from, if any."""
    for kind, members in _by_kind(adapters):
        kind.share(members, network, stored)


def before_step(adapters: Sequence[Adapter], step: Step) -> None:
    """Tells every type of adapter that a step begins."""
    for kind, members in _by_kind(adapters):
        kind.before_step(members, step)


def penalty(adapters: Sequence[Adapter]) -> Tensor | None:
    """What the adapters add to a step's loss, or None for nothing."""
    found = [kind.penalty(members) for kind, members in _by_kind(adapters)]
    terms = [term for term in found if term is not None]
    return torch.stack(terms).sum() if terms else None


def after_step(adapters: Sequence[Adapter], step: Step) -> None:
    """Tells every type of adapter that the optimizer has stepped."""
    for kind, members in _by_kind(adapters):
        kind.after_step(members, step)


def _by_kind(adapters: Sequence[Adapter]) -> list[tuple[type[Adapter], list[Adapter]]]:
    ordered = sorted(adapters, key=lambda adapter: type(adapter).__name__)
    return [(kind, list(members)) for kind, members in groupby(ordered, key=type)]
