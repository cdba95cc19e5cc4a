"""Float32 masters of narrow parameters: what the optimizer updates where the network itself is bfloat16 or float16.

Forward and backward run on the narrow parameters. As soon as a backward pass has the gradient of one, it is added to
the float32 gradient of its master and freed: micro-batches never add up in 16 bits, and the narrow gradients never
exist all at once. (The two uses of a tied weight within one pass are added by autograd, before anybody sees them.)
After a step the masters are rounded into the parameters. A float32 parameter is its own master and costs nothing. A
master may lie on another device, or in a file, where the step is then made.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from luthier.errors import TrainingError

__all__ = ["Keep", "Precision", "float32_masters", "is_narrow"]

Keep = Callable[[Tensor], Tensor]
"""Gives a tensor the place where it is to stay, such as a file."""


def is_narrow(parameter: Tensor) -> bool:
    """Whether its type rounds away the small updates of training, as bfloat16 and float16 do."""
    return parameter.dtype.itemsize < torch.float32.itemsize


def float32_masters(
    network: nn.Module,
    stored: Mapping[str, Tensor] | None = None,
    *,
    keep: Keep | None = None,
    every: bool = False,
) -> dict[nn.Parameter, nn.Parameter]:
    """A float32 master for each narrow parameter that is trained; a tied one, which the network has once, gets one.

    stored: weights by name as they were before the network was rounded; they become the masters without being copied.
    One that does not round to what the network has is of another model: the master then starts from the network's own.
    keep: where masters lie. every: float32 parameters get a master too, which is to lie elsewhere.
    """
    wide, masters = stored or {}, {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad and (every or is_narrow(parameter)):
            start = wide.get(name)
            if start is None or not torch.equal(start.detach().to(parameter.dtype), parameter.detach()):
                start = parameter
            master = start.detach().float()
            masters[parameter] = nn.Parameter(master if keep is None else keep(master))
    return masters


class Precision:
    """m <- step(m, sum of float32(gradients of w)), w <- round(m)        Micikevicius et al. 2018, section 3.1

    w: a narrow parameter of the network; m: its float32 master. Gradients are collected from the moment this is made
    until `close`.
    """

    def __init__(self, masters: Mapping[nn.Parameter, nn.Parameter] | None = None) -> None:
        self._masters = dict(masters or {})
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(_collect, master))
            for parameter, master in self._masters.items()
        ]

    def master(self, parameter: nn.Parameter) -> nn.Parameter:
        """What the optimizer updates for this parameter: its master, or itself."""
        return self._masters.get(parameter, parameter)

    @torch.no_grad()
    def write_back(self) -> None:
        """Rounds every master into its parameter."""
        for parameter, master in self._masters.items():
            parameter.copy_(master)

    def close(self) -> None:
        """Leaves the network's gradients to others; the masters stay readable here."""
        for hook in self._hooks:
            hook.remove()


def _collect(master: nn.Parameter, parameter: Tensor) -> None:
    """Moves the gradient of a parameter into its master's, which is float32."""
    gradient, parameter.grad = parameter.grad, None
    if gradient is None:
        raise TrainingError("another run collects this network's gradients; close its precision or load the model anew")
    if master.grad is None:
        master.grad = gradient.to(master.device, torch.float32)
    else:
        master.grad.add_(gradient.to(master.device))
