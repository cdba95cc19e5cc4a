"""Gradient checkpointing: what the backward pass computes a second time, so that the forward pass need not keep it.

Whole layers, of which only the input is kept (Chen et al. 2016), or of every layer the gated feed-forward part: it
keeps the most for the least work, since its last product need not be formed again and attention, whose cost grows with
the square of the length, stays as it is.
"""

from functools import partial
from typing import Literal

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from luthier.errors import ModelError
from luthier.models.fuse import FusedGatedMLP

__all__ = ["Recomputed", "checkpoint_layers"]

Recomputed = int | Literal["selective"]
"""Every so manyth layer, none for 0; or the feed-forward part of each."""


def checkpoint_layers(network: PreTrainedModel, what: Recomputed) -> None:
    """Recomputes this in the backward pass, and nothing else.

    Raises ModelError for an architecture whose layers cannot be recomputed so.
    """
    every = 0 if what == "selective" else what
    layers = [module for module in network.modules() if isinstance(module, GradientCheckpointingLayer)]
    parts = [module for module in network.modules() if isinstance(module, FusedGatedMLP)]
    if every and not layers:
        raise ModelError(f"{type(network).__name__} cannot recompute its layers; set gradient_checkpointing: 0")
    if what == "selective" and not parts:
        raise ModelError(
            f"{type(network).__name__} has no gated feed-forward layers to recompute; set gradient_checkpointing: 1"
        )
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = bool(every) and i % every == 0
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    for part in parts:
        part.recomputed = what == "selective"
