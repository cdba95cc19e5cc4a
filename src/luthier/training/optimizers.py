"""The optimizer of a run: AdamW over two groups of parameters, one that decays and one that does not."""

from collections.abc import Mapping

import torch
from torch import nn

from luthier.recipe.training import Training

__all__ = ["decays", "make_optimizer"]


def decays(network: nn.Module) -> dict[str, bool]:
    """For each trained parameter by name, whether weight decay applies: not to norms, biases (vectors) and
    embeddings.
    """
    spared = {
        id(p)
        for module in network.modules()
        if isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower()
        for p in module.parameters(recurse=False)
    }
    trained = ((name, p) for name, p in network.named_parameters() if p.requires_grad)
    return {name: p.ndim > 1 and id(p) not in spared for name, p in trained}


def make_optimizer(network: nn.Module, settings: Training) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) over the trained parameters, in the order of their names'
    appearance.
    """
    parameters = dict(network.named_parameters())
    groups: Mapping[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, decay in decays(network).items():
        groups[decay].append(parameters[name])
    return torch.optim.AdamW(
        [
            {"params": members, "weight_decay": settings.weight_decay if decay else 0.0}
            for decay, members in groups.items()
            if members
        ],
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        foreach=True,
    )
