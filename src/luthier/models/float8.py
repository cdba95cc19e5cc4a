"""The linear products of a model's layers in eight bits, switched on and off.

The layers stay the modules that they are, with the weights and names that they have; what is switched is how they
multiply. So adapters sit on them as on any, and what is saved has nothing of it. Embeddings, norms and what lies
outside the repeated blocks, as the output layer does, keep their type.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel

from luthier.adapters.adapted import bare
from luthier.adapters.targets import decoder_blocks, named_places
from luthier.errors import ModelError, RecipeError
from luthier.kernels.float8 import AmaxWindows
from luthier.models.fuse import FastLinear
from luthier.recipe.precision import FP8, DelayedFP8

__all__ = ["float8_layers", "in_float8", "out_of_float8"]


def in_float8(network: PreTrainedModel, settings: FP8) -> int:
    """Lets the linear layers of a fused network multiply in eight bits from now on, but for those that settings.skip
    names. Returns how many.

    Raises ModelError where the network has none, and RecipeError for a pattern that fits no layer, and where none is
    left.
    """
    layers = _candidates(network)
    if not layers:
        raise ModelError(f"{type(network).__name__} has no linear layers in its blocks; leave fp8 out")
    skipped = _named(list(layers), settings.skip)
    if skipped == layers.keys():
        raise RecipeError("fp8: skip leaves no layer in eight bits; remove a pattern, or fp8")
    delayed = isinstance(settings, DelayedFP8)
    length = settings.window if isinstance(settings, DelayedFP8) else 1
    for name in layers.keys() - skipped:
        layer = layers[name]
        made = AmaxWindows(length=length, delayed=delayed, margin=settings.margin, device=layer.weight.device)
        layer.windows = made.train(layer.training)
    return len(layers) - len(skipped)


def out_of_float8(network: nn.Module) -> None:
    """All layers multiply in their own type again."""
    for module in network.modules():
        if isinstance(module, FastLinear):
            module.windows = None


def float8_layers(network: nn.Module) -> dict[str, AmaxWindows]:
    """The windows of the layers that multiply in eight bits, by the layers' names without adapters."""
    found: dict[AmaxWindows, str] = {}
    for name, place in named_places(network):
        layer = bare(place)
        if isinstance(layer, FastLinear) and layer.windows is not None:
            found.setdefault(layer.windows, name)
    return {name: windows for windows, name in found.items()}


def _candidates(network: PreTrainedModel) -> dict[str, FastLinear]:
    blocks = tuple(f"{name}." for name in decoder_blocks(network))
    places = ((name, bare(place)) for name, place in named_places(network))
    return {name: layer for name, layer in places if isinstance(layer, FastLinear) and name.startswith(blocks)}


def _named(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    chosen: set[str] = set()
    for pattern in patterns:
        fitting = {name for name in names if fnmatchcase(name, pattern)}
        if not fitting:
            raise RecipeError(f'fp8: skip: no linear layer fits "{pattern}"; names look like {names[0]}')
        chosen |= fitting
    return chosen
