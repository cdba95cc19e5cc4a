"""What is to be trained, by kind: how fast it learns, whether it decays, and how its steps are made.

A parameter's learning rate is the run's, times what its adapter asks for (LoRA+), times what its layer is left
(`layer_decay`), times what the recipe says of its name (`parameter_groups`).
"""

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from luthier.adapters.copies import ModuleCopy
from luthier.adapters.ia3 import IA3
from luthier.adapters.inject import rate_ratios
from luthier.adapters.new_tokens import TokenRows
from luthier.adapters.prefix import Prefix
from luthier.adapters.prompt import Prompt
from luthier.adapters.targets import decoder_blocks, named_places
from luthier.errors import RecipeError, TrainingError
from luthier.recipe.optimizers import Adam8bit, Muon, ParameterGroup
from luthier.recipe.training import Training
from luthier.training.precision import Precision, is_narrow

__all__ = ["Kind", "decays", "grouped"]

_NEAREST = 3


class Kind(NamedTuple):
    """What the parameters of a group have in common. rate_ratio: by what the learning rate is multiplied. wide: moments
    stay in float32 where others do not. matrix: one in a layer, where Muon tells these apart.
    """

    weight_decay: float
    rate_ratio: float
    wide: bool
    matrix: bool


def decays(network: nn.Module) -> dict[str, bool]:
    """For each trained parameter by name, whether weight decay applies: not to norms, biases (vectors) and
    embeddings.
    """
    spared = {id(p) for module in network.modules() if _is_spared(module) for p in module.parameters(recurse=False)}
    trained = ((name, p) for name, p in network.named_parameters() if p.requires_grad)
    return {name: p.ndim > 1 and id(p) not in spared for name, p in trained}


def _is_spared(module: nn.Module) -> bool:
    """Norms and embeddings, copies of these, and adapters that stand for embeddings or are no change from zero."""
    norm = "norm" in type(_copied(module)).__name__.lower()
    return norm or _is_embedding(module) or isinstance(module, (IA3, Prefix, Prompt))


def _is_embedding(module: nn.Module) -> bool:
    """One of the model's, a copy of it, or rows of it."""
    return isinstance(_copied(module), (nn.Embedding, TokenRows))


def _copied(module: nn.Module) -> nn.Module:
    return module.place if isinstance(module, ModuleCopy) else module


def grouped(network: nn.Module, settings: Training, masters: Precision) -> list[tuple[Kind, list[nn.Parameter]]]:
    """What is to be updated, masters of what is narrow, by kind, each in the order of the names' appearance.

    Raises RecipeError for a pattern that fits nothing, TrainingError for what needs layers where there are none.
    """
    parameters, ratios, decaying = dict(network.named_parameters()), rate_ratios(network), decays(network)
    depths = _depth_ratios(network, settings.layer_decay) if settings.layer_decay != 1 else {}
    wide, matrices = _wide(network, settings), _matrices(network, settings)
    named = _by_name(list(decaying), settings.parameter_groups)
    groups: dict[Kind, list[nn.Parameter]] = {}
    for name, decay in decaying.items():
        parameter, own = parameters[name], named.get(name, ParameterGroup(rate_ratio=1.0))
        master = masters.master(parameter)
        assert not is_narrow(master), f"{name} is {master.dtype} and has no master; its small updates would be lost"
        kind = Kind(
            weight_decay=settings.weight_decay * decay if own.weight_decay is None else own.weight_decay,
            rate_ratio=ratios.get(name, 1.0) * depths.get(id(parameter), 1.0) * (own.rate_ratio or 1.0),
            wide=id(parameter) in wide,
            matrix=id(parameter) in matrices and decay and min(parameter.shape[-2:]) > 1,
        )
        groups.setdefault(kind, []).append(master)
    return sorted(groups.items(), key=lambda group: group[0], reverse=True)


def _wide(network: nn.Module, settings: Training) -> set[int]:
    """Embeddings, where their moments are stored otherwise."""
    if not isinstance(settings.optimizer, Adam8bit) or not settings.optimizer.stable_embedding:
        return set()
    return {id(p) for m in network.modules() if _is_embedding(m) for p in m.parameters(recurse=False)}


def _matrices(network: nn.Module, settings: Training) -> set[int]:
    """All within the layers, where Muon asks for it; so not embeddings, output layers and heads."""
    if not isinstance(settings.optimizer, Muon):
        return set()
    return {id(p) for layer in _layers(network, "optimizer: muon") for p in layer.parameters()}


def _layers(network: nn.Module, wanted_by: str) -> list[nn.Module]:
    """The numbered layers with their adapters."""
    places = dict(named_places(network))
    layers = [places[name] for name in decoder_blocks(network)]
    if not layers:
        raise TrainingError(f"{wanted_by}: {type(network).__name__} has no numbered layers; leave it out")
    return layers


def _depth_ratios(network: nn.Module, layer_decay: float) -> dict[int, float]:
    """layer_decay^(L - i) for what belongs to layer i of L, its adapters included, by the parameter's id; embeddings
    are layer 0, and what follows the layers (the last norm, an output layer of its own) is left out.
    """
    layers = _layers(network, "layer_decay")
    first = [module for module in network.modules() if _is_embedding(module)]
    return {
        id(p): layer_decay ** (len(layers) - i)
        for i, members in enumerate([first, *([layer] for layer in layers)])
        for module in members
        for p in module.parameters()
    }


def _by_name(names: Sequence[str], patterns: Mapping[str, ParameterGroup]) -> dict[str, ParameterGroup]:
    """The first pattern's group for each name that fits any. Raises RecipeError for a pattern that gets no name."""
    found: dict[str, ParameterGroup] = {}
    for pattern, group in patterns.items():
        fitting = [name for name in names if fnmatchcase(name, pattern)]
        if not fitting:
            near = ", ".join(_nearest(pattern, names))
            raise RecipeError(f'parameter_groups: no trained parameter fits "{pattern}"; nearest are {near}')
        left = [name for name in fitting if name not in found]
        if not left:
            raise RecipeError(
                f'parameter_groups: what fits "{pattern}" fits a pattern before it; put it first, or drop it'
            )
        found.update(dict.fromkeys(left, group))
    return found


def _nearest(pattern: str, names: Sequence[str]) -> list[str]:
    """Compared with as many characters at the names' ends, which differ in more than the number of a layer."""
    core = pattern.replace("*", "")
    by_end = {name[-max(1, len(core)) :]: name for name in names}
    return [by_end[end] for end in difflib.get_close_matches(core, by_end, n=_NEAREST, cutoff=0.0)]
