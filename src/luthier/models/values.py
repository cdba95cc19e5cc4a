"""A value head: what is expected of an answer still to come, read off hidden states, while a policy is trained.

It starts at zero, which expects nothing, stays in float32, and goes when the training is over: nobody is served by it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

__all__ = ["add_value_head", "remove_value_head", "values_at", "without_value_head"]

_NAME = "value_head"


def add_value_head(network: PreTrainedModel) -> None:
    """Puts a head of one output on the network, to be trained."""
    size = network.config.get_text_config().hidden_size
    head = nn.Linear(size, 1, device=network.device, dtype=torch.float32)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    network.add_module(_NAME, head)


def remove_value_head(network: PreTrainedModel) -> None:
    """Takes it away, where there is one."""
    if _NAME in dict(network.named_children()):
        delattr(network, _NAME)


@contextmanager
def without_value_head(network: PreTrainedModel) -> Iterator[None]:
    """The network without it for the time of the context, as it is saved for others."""
    head = dict(network.named_children()).get(_NAME)
    remove_value_head(network)
    try:
        yield
    finally:
        if head is not None:
            network.add_module(_NAME, head)


def values_at(network: PreTrainedModel, hidden: Tensor) -> Tensor:
    """hidden: [targets, hidden]. Returns [targets] in the head's type, in units of the reward."""
    head: nn.Module = network.get_submodule(_NAME)
    values: Tensor = head(hidden.to(next(head.parameters()).dtype))
    return values.squeeze(-1)
