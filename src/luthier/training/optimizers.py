"""The optimizer of a run: AdamW over groups of parameters that decay or do not, and learn as fast or faster.

Its moments take four bytes each, or one with `adam8bit`. The optimizer of four is PyTorch's fused one. It reads and
writes each number once (on a CPU 12 times faster than the other), takes no memory besides its moments, and can leave a
step out on the device, without the program waiting for the gradient.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from luthier.adapters.copies import ModuleCopy
from luthier.adapters.ia3 import IA3
from luthier.adapters.inject import rate_ratios
from luthier.adapters.new_tokens import TokenRows
from luthier.adapters.prefix import Prefix
from luthier.adapters.prompt import Prompt
from luthier.adapters.targets import decoder_blocks, named_places
from luthier.errors import TrainingError
from luthier.recipe.training import Training
from luthier.training.adam8bit import Adam8bit
from luthier.training.precision import Precision, is_narrow

__all__ = ["decays", "make_optimizer", "step_if_finite"]


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


class _Kind(NamedTuple):
    """What the parameters of a group have in common. ratio: by what the learning rate is multiplied."""

    decay: bool
    ratio: float
    embedding: bool


def make_optimizer(network: nn.Module, settings: Training, precision: Precision | None = None) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) over the trained parameters, in the order of their names'
    appearance.

    precision: has the masters of those that are narrow. A group's `rate_ratio` is by what its learning rate is
    multiplied.
    """
    groups = [
        {"params": members, "weight_decay": settings.weight_decay if kind.decay else 0.0, "rate_ratio": kind.ratio}
        | ({"wide": kind.embedding} if settings.optimizer == "adam8bit" else {})
        for kind, members in _grouped(network, settings, precision or Precision())
    ]
    rate, eps = settings.learning_rate, settings.adam_epsilon
    betas = settings.adam_beta1, settings.adam_beta2
    if settings.optimizer == "adam8bit":
        return Adam8bit(groups, lr=rate, betas=betas, eps=eps)
    return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=eps, fused=True)


def _grouped(network: nn.Module, settings: Training, masters: Precision) -> list[tuple[_Kind, list[nn.Parameter]]]:
    """What is to be updated, by kind. Embeddings are of a kind of their own only where their moments are stored
    otherwise.
    """
    parameters, ratios = dict(network.named_parameters()), rate_ratios(network)
    depths = _depth_ratios(network, settings.layer_decay) if settings.layer_decay != 1 else {}
    embeddings = {id(p) for m in network.modules() if _is_embedding(m) for p in m.parameters(recurse=False)}
    groups: dict[_Kind, list[nn.Parameter]] = {}
    for name, decay in decays(network).items():
        master = masters.master(parameters[name])
        assert not is_narrow(master), f"{name} is {master.dtype} and has no master; its small updates would be lost"
        embedding = bool(settings.stable_embedding) and id(parameters[name]) in embeddings
        ratio = ratios.get(name, 1.0) * depths.get(id(parameters[name]), 1.0)
        groups.setdefault(_Kind(decay, ratio, embedding), []).append(master)
    return sorted(groups.items(), key=lambda group: group[0], reverse=True)


def _depth_ratios(network: nn.Module, layer_decay: float) -> dict[int, float]:
    """layer_decay^(L - i) for what belongs to layer i of L, its adapters included, by the parameter's id; embeddings
    are layer 0, and what follows the layers (the last norm, an output layer of its own) is left out.
    """
    places = dict(named_places(network))
    layers = [places[name] for name in decoder_blocks(network)]
    if not layers:
        raise TrainingError(f"layer_decay: {type(network).__name__} has no numbered layers; leave it out")
    first = [module for module in network.modules() if _is_embedding(module)]
    return {
        id(p): layer_decay ** (len(layers) - i)
        for i, members in enumerate([first, *([layer] for layer in layers)])
        for module in members
        for p in module.parameters()
    }


def step_if_finite(optimizer: torch.optim.Optimizer, grad_norm: Tensor, *, at_most: float = math.inf) -> Tensor:
    """One step, or none where the norm is not finite or over a bound: parameters, moments and count then stay.

    Returns 1 where the step is left out, else 0, on the device, where that is decided. `found_inf` is how PyTorch's
    loss scaling (torch.amp.GradScaler) tells it to a fused optimizer, and to ours.
    """
    left_out = (~torch.isfinite(grad_norm) | (grad_norm > at_most)).float()
    optimizer.found_inf = left_out  # type: ignore[attr-defined]
    optimizer.step()
    return left_out
