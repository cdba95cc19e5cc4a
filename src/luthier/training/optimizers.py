"""The optimizer of a run: groups of parameters, each with its rule, stepped at once or not at all.

A step is left out on the device, without the program waiting for the gradient. Some optimizers take gradients at other
weights than those that are to be evaluated and saved; `eval` and `train` exchange them.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from luthier.recipe.training import Training
from luthier.training.adam8bit import ADAM8BIT
from luthier.training.groups import grouped
from luthier.training.precision import Keep, Precision
from luthier.training.rules import ADAFACTOR, ADAMW, LION, MUON, SCHEDULE_FREE, Group, Member, Rule, State

__all__ = ["OPTIMIZERS", "Optimizer", "make_optimizer", "step_if_finite"]

OPTIMIZERS: dict[str, Rule] = {
    "adamw": ADAMW,
    "adam8bit": ADAM8BIT,
    "adafactor": ADAFACTOR,
    "lion": LION,
    "muon": MUON,
    "schedule_free": SCHEDULE_FREE,
}

_TRAINED_AT = "y"  # of a parameter's state, while it holds the average


class Optimizer(torch.optim.Optimizer):
    """Steps each group by its `rule`.

    keep: where what is kept from step to step lies. found_inf, if set, is one where the step is to be left out:
    parameters, moments and counts then stay as they are.
    """

    def __init__(self, groups: Iterable[Group], *, keep: Keep | None = None) -> None:
        super().__init__(groups, {})
        self.found_inf: Tensor | None = None
        self._keep = keep

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        for group in self.param_groups:
            members = [Member(p, p.grad, self._state_of(p, group)) for p in group["params"] if p.grad is not None]
            if members:
                group["rule"].step(members, group, self._left_out(members[0].weight.device))

    @torch.no_grad()
    def hold(self) -> None:
        """Makes the state of every parameter where it is not there yet, as its first step would."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._state_of(parameter, group)

    def _left_out(self, device: torch.device) -> Tensor:
        if self.found_inf is None:
            return torch.zeros((), dtype=torch.bool, device=device)
        return self.found_inf.to(device).bool()

    def _state_of(self, parameter: nn.Parameter, group: Group) -> State:
        state: State = self.state[parameter]
        if not state:
            state.update({name: self.kept(value) for name, value in group["rule"].start(parameter, group).items()})
        return state

    def kept(self, value: Tensor) -> Tensor:
        """The tensor in its place."""
        return value if self._keep is None else self._keep(value)

    @torch.no_grad()
    def eval(self) -> bool:
        """Puts averages in place of the weights that have one, whose own values it keeps; returns whether any has."""
        averaged = [(p, group) for group in self.param_groups if group["rule"].average for p in group["params"]]
        averaged = [(p, group) for p, group in averaged if self.state.get(p) and _TRAINED_AT not in self.state[p]]
        for parameter, group in averaged:
            state = self.state[parameter]
            state[_TRAINED_AT] = self.kept(parameter.detach().clone())
            parameter.copy_(group["rule"].average(parameter, state, group))
        return bool(averaged)

    @torch.no_grad()
    def train(self) -> bool:
        """Puts the weights back that `eval` has kept, to the bit; returns whether there are any."""
        kept = [(parameter, state.pop(_TRAINED_AT)) for parameter, state in self.state.items() if _TRAINED_AT in state]
        for parameter, value in kept:
            parameter.copy_(value)
        return bool(kept)


def make_optimizer(
    network: nn.Module, settings: Training, precision: Precision | None = None, *, keep: Keep | None = None
) -> Optimizer:
    """The settings' optimizer over the trained parameters.

    precision: has the masters of those that are narrow. keep: where moments lie. A group's `rate_ratio` is by what its
    learning rate is multiplied.
    """
    rule, numbers = OPTIMIZERS[settings.optimizer.type], settings.optimizer.model_dump(exclude={"type"})
    groups = [
        {"params": members, "lr": settings.learning_rate, **kind._asdict(), **numbers}
        | {"rule": ADAMW if rule is MUON and not kind.matrix else rule}
        for kind, members in grouped(network, settings, precision or Precision())
    ]
    return Optimizer(groups, keep=keep)


def step_if_finite(optimizer: Optimizer, grad_norm: Tensor, *, at_most: float = math.inf) -> Tensor:
    """One step, or none where the norm is not finite or over a bound: parameters, moments and count then stay.

    Returns 1 where the step is left out, else 0, on the device, where that is decided. `found_inf` is how PyTorch's
    loss scaling (torch.amp.GradScaler) tells it to a fused optimizer.
    """
    optimizer.found_inf = (~torch.isfinite(grad_norm) | (grad_norm > at_most)).float()
    optimizer.step()
    return optimizer.found_inf
