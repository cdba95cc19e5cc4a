"""What one training is made of, for the loop to go through."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from luthier.adapters.base import Adapter
from luthier.data.batches import Plan, TokenBatch, cut
from luthier.data.sequences import Item
from luthier.objectives.loss import Loss
from luthier.recipe.training import Training
from luthier.training.callbacks import Callback
from luthier.training.checkpoints import Checkpoints
from luthier.training.energy import EnergyMeter
from luthier.training.room import Room
from luthier.training.state import TrainState
from luthier.training.stopping import Stop

__all__ = ["Guard", "Measure", "Objective", "Preparation", "Run"]

Objective = Callable[[nn.Module, TokenBatch], Loss]
Preparation = Callable[[nn.Module, Sequence[TokenBatch]], list[TokenBatch]]
"""What an objective needs of all micro-batches of a step before the first of them, such as a baseline."""
Measure = Callable[[nn.Module, Sequence[TokenBatch]], dict[str, float]]
Guard = Callable[[dict[str, float]], str | None]


@dataclass
class Run:
    """All that one training is made of. eval_items: what is evaluated on; empty for none.

    micro_batch_tokens: the bound on a micro-batch, in the beginning.

    prepare: gives a step's micro-batches, or those of an evaluation, what the objective wants of all of them. measure:
    what an evaluation tells besides the objective's metrics. evaluation: what stands for an evaluation on batches,
    "loss" among it, the lower the better. guard: of what an evaluation or a step told, why the training has to end.
    energy: measured from one line of metrics to the next.
    """

    state: TrainState
    plan: Plan
    objective: Objective
    settings: Training
    micro_batch_tokens: int | None
    checkpoints: Checkpoints | None = None
    eval_items: Sequence[Item] = ()
    callbacks: Sequence[Callback] = ()
    adapters: Sequence[Adapter] = ()
    prepare: Preparation | None = None
    measure: Measure | None = None
    evaluation: Callable[[], dict[str, float]] | None = None
    guard: Guard | None = None
    energy: EnergyMeter | None = None

    @property
    def stop(self) -> Stop:
        """The callback through which the run can be asked to end; where there is none, one that nobody asks."""
        return next((callback for callback in self.callbacks if isinstance(callback, Stop)), Stop())

    @property
    def evaluates(self) -> bool:
        """Whether there is anything to evaluate on."""
        return bool(self.eval_items) or self.evaluation is not None

    @property
    def room(self) -> Room:
        """How large a micro-batch may be by now."""
        return Room(self.settings, self.micro_batch_tokens, lambda: self.state.progress)

    def cut(self, step: int) -> list[TokenBatch]:
        """The micro-batches of a step, counted from 0."""
        return cut(self.plan.step(step), self.room.tokens, packing=self.settings.packing)

    def prepared(self, batches: Sequence[TokenBatch]) -> Sequence[TokenBatch]:
        """The micro-batches with what the objective wants."""
        return batches if self.prepare is None else self.prepare(self.state.network, batches)
