"""What a run is, at the end of a step: everything that the next step depends on.

The data's order and dropout's draws are functions of the seed and the step, the learning rate of the step, so what
remains is the trained parameters (of narrow ones the float32 masters, from which the narrow follow), the optimizer's
moments and a few numbers. No random state has to be kept.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from luthier.models.float8 import float8_layers
from luthier.recipe.precision import LossScaling
from luthier.training.loss_scaling import LossScale, first_scale
from luthier.training.optimizers import Optimizer
from luthier.training.precision import Precision

__all__ = ["Progress", "TrainState"]


@dataclass
class Progress:
    """Numbers that go on counting. best_loss: of the evaluations so far. stale_evaluations: since it last fell.
    skipped_steps: in a row, up to now, for a gradient that was not finite. stopped_by: what a guard said when it ended
    the training. loss_scale, good_steps: the next step's `LossScale`, once there was a step. micro_batch_tokens: the
    bound on a micro-batch, once memory has run out. spikes: steps left out for one. norms: what `remembered` keeps,
    where spikes are looked for. left_out: steps, counted from 0 and rising, that the run went back before and leaves
    out. unevaluated: the step's evaluation is still to come.
    """

    step: int = 0
    tokens: int = 0
    best_loss: float | None = None
    stale_evaluations: int = 0
    skipped_steps: int = 0
    early_stopped: bool = False
    stopped_by: str | None = None
    loss_scale: float | None = None
    good_steps: int = 0
    micro_batch_tokens: int | None = None
    spikes: int = 0
    norms: list[float] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    unevaluated: bool = False

    def loss_scale_by(self, settings: LossScaling | None) -> LossScale:
        """By what the next step's loss is multiplied."""
        if self.loss_scale is None:
            return first_scale(settings)
        return LossScale(self.loss_scale, self.good_steps)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass
class TrainState:
    """The network, its optimizer, how far they are, and the precision that the optimizer was made with."""

    network: nn.Module
    optimizer: Optimizer
    progress: Progress
    precision: Precision = field(default_factory=Precision)

    def trained(self) -> dict[str, nn.Parameter]:
        """What the optimizer updates, by the parameters' names: themselves, or their float32 masters."""
        return {name: self.precision.master(p) for name, p in self.network.named_parameters() if p.requires_grad}

    def hold_all(self) -> None:
        """Makes gradients, which are zero, and the optimizer's state where it is not there yet: all that a step holds
        while its last micro-batch runs. Leaves everything as it was otherwise.
        """
        for parameter in self.trained().values():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.hold()

    def drop_gradients(self) -> None:
        """Frees the gradients of all that is trained."""
        self.optimizer.zero_grad(set_to_none=True)
        self.network.zero_grad(set_to_none=True)  # of narrow parameters too, where a backward pass was cut short

    def eval(self) -> None:
        """Before weights are evaluated or saved: those that are meant to be, where the optimizer learns at others."""
        if self.optimizer.eval():
            self.precision.write_back()

    def train(self) -> None:
        """Before a step: the weights that gradients are taken at."""
        if self.optimizer.train():
            self.precision.write_back()

    def tensors(self) -> dict[str, Tensor]:
        """The trained parameters and the optimizer's state of each, under `parameter/NAME` and `optimizer/KEY/NAME`;
        what adapters keep besides, under `buffer/NAME`; the windows of layers in eight bits, under `float8/NAME`.
        """
        kept: dict[str, Tensor] = {}
        for name, parameter in self.trained().items():
            kept[f"parameter/{name}"] = parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                kept[f"optimizer/{key}/{name}"] = value
        for name, value in self._adapters_own().items():
            kept[f"buffer/{name}"] = value
        for name, windows in float8_layers(self.network).items():
            kept[f"float8/{name}"] = windows.seen
        return kept

    def is_finite(self) -> bool:
        """Whether all trained parameters and their moments are numbers, so that one can go on from them."""
        of_steps = ("parameter/", "optimizer/")  # what a window saw of a step that failed is forgotten by itself
        kept = [tensor for name, tensor in self.tensors().items() if name.startswith(of_steps)]
        return all(bool(tensor.isfinite().all()) for tensor in kept if tensor.is_floating_point())

    def marks(self) -> dict[str, tuple[int, int]]:
        """Where each trained parameter lies, and how often it was written into: of equal marks nothing has changed."""
        return {name: (parameter.data_ptr(), parameter._version) for name, parameter in self.trained().items()}

    def _adapters_own(self) -> dict[str, Tensor]:
        """What adapters keep from step to step besides parameters."""
        stored = self.network.state_dict(keep_vars=True)
        buffers = dict(self.network.named_buffers())
        return {name: value for name, value in stored.items() if ".adapters." in name and name in buffers}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], progress: Progress) -> None:
        """The inverse of `tensors`. Raises KeyError for a parameter that is missing."""
        by_name = self.trained()
        for name, parameter in by_name.items():
            parameter.copy_(tensors[f"parameter/{name}"])
            self.optimizer.state.pop(parameter, None)
        for name, value in self._adapters_own().items():
            value.copy_(tensors[f"buffer/{name}"])
        for name, windows in float8_layers(self.network).items():
            windows.seen.copy_(tensors[f"float8/{name}"])
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, slot, name = key.split("/", 2)
                value = value.to(by_name[name].device, copy=True)
                self.optimizer.state[by_name[name]][slot] = self.optimizer.kept(value)
        self.precision.write_back()
        self.progress = progress
