"""How optimizers make steps of gradients: a rule for each group of parameters, a function of tensors.

PyTorch's fused AdamW is taken as it is. The other rules are a few lines each and are written out, though libraries have
them: there Adafactor reads three numbers a parameter from the device, Schedule-Free counts in numbers that no
checkpoint has and changes the gradients, which adapters look at after a step, and none can leave a step out without the
program waiting for the gradient. Tests hold each to its library, step by step.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from luthier.quant.parts import weights_at_once

__all__ = ["ADAFACTOR", "ADAMW", "LION", "MUON", "SCHEDULE_FREE", "Group", "Member", "Rule", "State", "fused_adamw"]

Group = dict[str, Any]
"""What the parameters of a group share: the settings of the optimizer by name, and `lr`, `weight_decay`, `wide`."""
State = dict[str, Tensor]

_SMALLEST_SIZE = 1e-3  # Adafactor's second epsilon: the size of a parameter that is nearly zero
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: a x + b x^3 + c x^5 lifts small singular values fast
_NEWTON_SCHULZ_STEPS = 5


class Member(NamedTuple):
    """A parameter, its gradient of the same shape, and what is kept of it from step to step."""

    weight: Tensor
    gradient: Tensor
    state: State


@dataclass(frozen=True, slots=True)
class Rule:
    """start: a parameter's state before its first step. step: changes members in place, and none of it where the last
    argument, bool [], is true. average: what is evaluated and saved in place of a weight, where that is another.
    """

    start: Callable[[Tensor, Group], State]
    step: Callable[[Sequence[Member], Group, Tensor], None]
    average: Callable[[Tensor, State, Group], Tensor] | None = None


def _keep(old: Tensor, new: Tensor, left_out: Tensor) -> None:
    """Stores the new values, unless they are to be left out."""
    torch.where(left_out, old, new, out=old)


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape, so much at a time as takes little memory besides."""
    if not all(t.is_contiguous() for t in tensors):
        yield tensors
        return
    at_once = weights_at_once(tensors[0].device)
    yield from zip(*(t.view(-1).split(at_once) for t in tensors), strict=True)


def _one_by_one(step: Callable[[Member, Group, Tensor], None]) -> Callable[[Sequence[Member], Group, Tensor], None]:
    def each(members: Sequence[Member], group: Group, left_out: Tensor) -> None:
        for member in members:
            step(member, group, left_out)

    return each


def _count(weight: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.float32, device=weight.device)


def _moments(weight: Tensor, group: Group) -> State:
    return {"step": _count(weight), "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}


def fused_adamw(members: Sequence[Member], group: Group, left_out: Tensor) -> None:
    """m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2        Loshchilov and Hutter 2019, algorithm 2
    w <- (1 - rate * decay) w - rate * m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + epsilon)
    """
    adamw(
        [member.weight for member in members],
        [member.gradient for member in members],
        [member.state["exp_avg"] for member in members],
        [member.state["exp_avg_sq"] for member in members],
        [],
        [member.state["step"] for member in members],
        fused=True,
        found_inf=left_out.float(),
        amsgrad=False,
        maximize=False,
        beta1=group["beta1"],
        beta2=group["beta2"],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["epsilon"],
    )


def _lion(member: Member, group: Group, left_out: Tensor) -> None:
    """w <- w - rate * (sign(b1 m + (1 - b1) g) + decay * w),  m <- b2 m + (1 - b2) g        Chen et al. 2023, alg. 2"""
    for weight, gradient, mean in _parts(member.weight, member.gradient, member.state["exp_avg"]):
        sign = gradient.lerp(mean, group["beta1"]).sign_()
        kept = weight * (1 - group["lr"] * group["weight_decay"])
        _keep(weight, kept.sub_(sign, alpha=group["lr"]), left_out)
        _keep(mean, gradient.lerp(mean, group["beta2"]), left_out)


def _factors(weight: Tensor, group: Group) -> State:
    if weight.ndim < 2:
        return {"step": _count(weight), "variance": torch.zeros_like(weight)}
    rows, columns = weight[..., :1], weight[..., :1, :]
    return {"step": _count(weight), "row_var": torch.zeros_like(rows), "col_var": torch.zeros_like(columns)}


def _adafactor(member: Member, group: Group, left_out: Tensor) -> None:
    """w <- (1 - rate * decay) w - rate * u / max(1, rms(u) / clip),  u = g / sqrt(v)        Shazeer and Stern 2018

    (Algorithms 4 and 5.) v of a matrix is r c / mean(r), with r and c the running means of its rows' and columns' mean
    squares, [out, 1] and [1, in]. With `scale_parameter` the rate is that times rms(w), 1e-3 at least.
    """
    weight, gradient, state = member
    state["step"] += ~left_out
    share = state["step"].clamp(min=1) ** -group["decay_exponent"]
    new = {name: old.lerp(_squares(gradient, name, group["epsilon"]), share) for name, old in _variances(state)}
    if "variance" in new:
        update = gradient * new["variance"].rsqrt()
    else:
        rows = new["row_var"]
        update = (gradient * rows.div(rows.mean(-2, keepdim=True)).rsqrt_()).mul_(new["col_var"].rsqrt())
    update.div_((_rms(update) / group["clip"]).clamp_(min=1))
    if group["scale_parameter"]:
        update.mul_(_rms(weight).clamp_(min=_SMALLEST_SIZE))
    kept = weight * (1 - group["lr"] * group["weight_decay"])
    _keep(weight, kept.sub_(update, alpha=group["lr"]), left_out)
    for name, old in _variances(state):
        _keep(old, new[name], left_out)


def _variances(state: State) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in state.items() if name != "step"]


def _squares(gradient: Tensor, name: str, epsilon: float) -> Tensor:
    if name == "variance":
        return gradient.square().add_(epsilon)
    dim = -1 if name == "row_var" else -2
    norm: Tensor = torch.linalg.vector_norm(gradient, dim=dim, keepdim=True)
    return norm.square_().div_(gradient.shape[dim]).add_(epsilon)


def _rms(values: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values)
    return norm.div_(math.sqrt(values.numel()))


def _muon(member: Member, group: Group, left_out: Tensor) -> None:
    """m <- momentum * m + (1 - momentum) g        Jordan et al. 2024, with the scale of Liu et al. 2025, eq. 4
    w <- (1 - rate * decay) w - 0.2 rate sqrt(max(out, in)) orthogonal(momentum * m + (1 - momentum) g)

    The scale gives a step the root mean square of AdamW's usual ones, 0.2, so AdamW's rates fit.
    """
    weight, gradient, state = member
    mean = state["momentum_buffer"].lerp(gradient, 1 - group["momentum"])
    update = _orthogonal(gradient.lerp(mean, group["momentum"]))
    scale = 0.2 * math.sqrt(max(weight.shape[-2:]))
    kept = weight * (1 - group["lr"] * group["weight_decay"])
    _keep(weight, kept.sub_(update, alpha=group["lr"] * scale), left_out)
    _keep(state["momentum_buffer"], mean, left_out)


def _orthogonal(matrix: Tensor) -> Tensor:
    """U V' of the matrix U S V', roughly: singular values between 0.68 and 1.2, but for what was nearly zero; bfloat16.
    Of several, [..., out, in], each.
    """
    if matrix.ndim > 2:
        return torch.stack([_orthogonal(one) for one in matrix])
    a, b, c = _NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.mT if tall else matrix).bfloat16()
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        squares = x @ x.mT
        x = torch.addmm(x, torch.addmm(squares, squares, squares, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _iterates(weight: Tensor, group: Group) -> State:
    counts = {"step": _count(weight), "weight_sum": _count(weight)}
    return counts | {"z": weight.detach().clone(), "exp_avg_sq": torch.zeros_like(weight)}


def _schedule_free(member: Member, group: Group, left_out: Tensor) -> None:
    """z <- z - rate * d,  x <- (1 - c) x + c z,  y <- (1 - b1) z + b1 x        Defazio et al. 2024, algorithm 1

    d = g / (sqrt(v / (1 - b2^t)) + epsilon) + decay * y, and c = rate^2 over the sum of all rates^2 so far. The weight
    is y, whose gradient is taken; x, the average, is not kept but follows from y and z.
    """
    rate, beta1, beta2, state = group["lr"], group["beta1"], group["beta2"], member.state
    state["step"] += ~left_out
    state["weight_sum"] += ~left_out * rate**2
    c = rate**2 / state["weight_sum"]
    root = (1 - beta2 ** state["step"].double()).sqrt().float()
    for y, gradient, z, square in _parts(member.weight, member.gradient, state["z"], state["exp_avg_sq"]):
        v = (square * beta2).addcmul_(gradient, gradient, value=1 - beta2)
        d = gradient / (v.sqrt() / root).add_(group["epsilon"])
        d.add_(y, alpha=group["weight_decay"])
        _keep(y, y.lerp(z, c).sub_(d * (rate * (1 - beta1 * (1 - c)))), left_out)
        _keep(z, z.sub(d, alpha=rate), left_out)
        _keep(square, v, left_out)


def _average(weight: Tensor, state: State, group: Group) -> Tensor:
    """x of y = (1 - b1) z + b1 x."""
    return weight.lerp(state["z"], 1 - 1 / group["beta1"])


ADAMW = Rule(_moments, fused_adamw)
ADAFACTOR = Rule(_factors, _one_by_one(_adafactor))
LION = Rule(lambda weight, group: {"exp_avg": torch.zeros_like(weight)}, _one_by_one(_lion))
MUON = Rule(lambda weight, group: {"momentum_buffer": torch.zeros_like(weight)}, _one_by_one(_muon))
SCHEDULE_FREE = Rule(_iterates, _one_by_one(_schedule_free), _average)
