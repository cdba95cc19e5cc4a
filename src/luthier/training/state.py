"""What a run is, at the end of a step: everything that the next step depends on.

The data's order and dropout's draws are functions of the seed and the step, the learning rate of the step, so what
remains is the trained parameters, the optimizer's moments and a few numbers. No random state has to be kept.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Progress", "TrainState"]


@dataclass
class Progress:
    """Numbers that go on counting. best_loss: of the evaluations so far. stale_evaluations: since it last fell."""

    step: int = 0
    tokens: int = 0
    best_loss: float | None = None
    stale_evaluations: int = 0
    skipped_steps: int = 0
    early_stopped: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass
class TrainState:
    """The network, its optimizer, and how far they are."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    progress: Progress

    def trained(self) -> dict[str, Tensor]:
        """The trained parameters by name."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def tensors(self) -> dict[str, Tensor]:
        """The trained parameters and the optimizer's state of each, under `parameter/NAME` and `optimizer/KEY/NAME`."""
        kept: dict[str, Tensor] = {}
        for name, parameter in self.trained().items():
            kept[f"parameter/{name}"] = parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                kept[f"optimizer/{key}/{name}"] = value
        return kept

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], progress: Progress) -> None:
        """The inverse of `tensors`. Raises KeyError for a parameter that is missing."""
        for name, parameter in self.trained().items():
            parameter.copy_(tensors[f"parameter/{name}"])
        by_name = self.trained()
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, slot, name = key.split("/", 2)
                device = by_name[name].device if value.ndim else value.device  # AdamW counts its steps on the CPU
                self.optimizer.state[by_name[name]][slot] = value.to(device, copy=True)
        self.progress = progress
