"""Which of a model's parameters are trained: all, those of adapters, or all but some by pattern."""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from luthier.adapters.inject import adapter_parameters
from luthier.errors import RecipeError
from luthier.quant.linear import QuantizedLinear

__all__ = ["freeze_base", "train_all_but", "trainable_parameters"]


def freeze_base(network: nn.Module) -> None:
    """No parameter is trained but those of adapters."""
    own = adapter_parameters(network)
    for name, parameter in network.named_parameters():
        if name not in own:
            parameter.requires_grad_(False)


def train_all_but(network: nn.Module, patterns: Sequence[str]) -> None:
    """Every parameter is trained but those whose names fit a pattern (`*.embed_tokens.*`).

    Raises RecipeError for a pattern that fits no parameter, and where nothing is left to train.
    """
    network.requires_grad_(True)
    parameters = dict(network.named_parameters())
    for pattern in patterns:
        fitting = [name for name in parameters if fnmatchcase(name, pattern)]
        if not fitting:
            raise RecipeError(f'freeze: no parameter fits "{pattern}"; names look like {next(iter(parameters))}')
        for name in fitting:
            parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise RecipeError("freeze: the patterns leave nothing to train; remove one of them")


def trainable_parameters(network: nn.Module) -> tuple[int, int]:
    """How many parameters are trained, and how many there are; a weight in few bits counts as it was."""
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    stored = sum(math.prod(module.shape) for module in network.modules() if isinstance(module, QuantizedLinear))
    return trained, sum(p.numel() for p in network.parameters()) + stored
