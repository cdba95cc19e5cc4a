"""AdamW whose moments take one byte each: codes of the dynamic 8-bit type, scaled by the largest of their block.

A step makes the moments of a part of a parameter wide, updates them and that part in float32, and rounds them back, so
no float32 copy of all moments ever exists. Small parameters, and groups that ask for it, keep float32 moments and are
PyTorch's fused AdamW. Codes are those of bitsandbytes' CPU library (0.50) to the bit, but for one thing: there a moment
of zero becomes a small positive one, and a weight without any gradient drifts; here, as on its GPU, zero stays zero.
"""

from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from luthier.quant.dynamic import GRID, SMALLEST, dynamic_map, in_blocks
from luthier.quant.parts import weights_at_once
from luthier.training.rules import Group, Member, Rule, State, fused_adamw

__all__ = ["ADAM8BIT", "BLOCK", "SMALLEST_NARROW", "adam8bit", "dequantize", "quantize"]

BLOCK = 2048  # values that share a scale; Dettmers et al. 2022, section 2
SMALLEST_NARROW = 4096  # elements of the smallest parameter whose moments are narrow


def quantize(values: Tensor, *, signed: bool, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """For each value the code of the map's nearest to value / absmax, uint8 [values], and absmax of each block.

    values: float32 [values]; not negative where `signed` is off. Nearest is meant up to a grid of 65,536 values from -1
    to 1, as bitsandbytes' CPU library means it; what is not finite gets any code.
    """
    blocks = in_blocks(values, block)
    absmax = blocks.abs().amax(1) if signed else blocks.amax(1)
    scaled = blocks * absmax.clamp(min=SMALLEST).reciprocal()[:, None]
    steps = scaled.add_(1).mul_(GRID / 2).add_(0.5).int().clamp_(0, GRID)
    codes_map = _map(signed, values)
    codes = codes_map.code_of_step.index_select(0, steps.flatten())[: values.numel()]
    return codes.masked_fill_(values == 0, codes_map.zero), absmax


def dequantize(codes: Tensor, absmax: Tensor, *, signed: bool, block: int = BLOCK) -> Tensor:
    """map[code] * absmax, float32 [codes]. codes: uint8 [codes]. absmax: float32 [blocks]."""
    wide = _map(signed, codes).values.index_select(0, codes.int())
    return in_blocks(wide, block).mul_(absmax[:, None]).flatten()[: codes.numel()]


def adam8bit(block: int = BLOCK) -> Rule:
    """m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2        Dettmers et al. 2022, section 2
    w <- (1 - rate * decay) w - rate / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + epsilon)

    m and v are kept as `quantize` has them. A group with `wide` keeps them in float32, as do parameters of fewer than
    4,096 elements. Parameters are float32.
    """
    return Rule(partial(_start, block=block), partial(_step, block=block))


def _step(members: Sequence[Member], group: Group, left_out: Tensor, *, block: int) -> None:
    wide = [member for member in members if "exp_avg" in member.state]
    if wide:
        fused_adamw(wide, group, left_out)
    for member in members:
        if "exp_avg" not in member.state:
            _step_narrow(member, group, left_out, block)


def _step_narrow(member: Member, group: Group, left_out: Tensor, block: int) -> None:
    weight, gradient, state = member
    state["step"] += ~left_out
    flat = weight.detach().contiguous().view(-1)
    num_blocks = max(1, weights_at_once(weight.device) // block)
    values = [t.split(num_blocks * block) for t in (flat, gradient.reshape(-1))]
    moments = [_parts(state, name, num_blocks, block) for name in ("exp_avg", "exp_avg_sq")]
    step = _Step.of(group, state["step"], left_out, block)
    for part in zip(*values, *moments, strict=True):
        step.take(*part)
    if not weight.is_contiguous():
        weight.copy_(flat.view_as(weight))


class _Moment(NamedTuple):
    """codes: uint8 [values]; absmax: float32 [blocks]."""

    codes: Tensor
    absmax: Tensor

    def keep(self, values: Tensor, left_out: Tensor, block: int, *, signed: bool) -> None:
        """Stores the values, unless they are to be left out."""
        for old, new in zip(self, quantize(values, signed=signed, block=block), strict=True):
            torch.where(left_out, old, new, out=old)


def _start(parameter: Tensor, group: Group, *, block: int) -> State:
    """Moments of zero, and no step taken."""
    state = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)}
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        if group["wide"] or parameter.numel() < SMALLEST_NARROW:
            state[name] = torch.zeros_like(parameter)
        else:
            zero, num_blocks = _map(signed, parameter).zero, -(-parameter.numel() // block)
            state[f"{name}_codes"] = parameter.new_full((parameter.numel(),), zero, dtype=torch.uint8)
            state[f"{name}_absmax"] = parameter.new_zeros(num_blocks)
    return state


def _parts(state: State, name: str, num_blocks: int, block: int) -> Iterator[_Moment]:
    """Of a moment, so many blocks at a time."""
    codes, absmax = state[f"{name}_codes"].split(num_blocks * block), state[f"{name}_absmax"].split(num_blocks)
    return (_Moment(*part) for part in zip(codes, absmax, strict=True))


class _Step(NamedTuple):
    """The numbers of a parameter's step. kept: what decay leaves of a weight; rate and root: the learning rate over the
    bias of the mean, and the root of the bias of the squares, each [].
    """

    betas: tuple[float, float]
    eps: float
    kept: float
    rate: Tensor
    root: Tensor
    left_out: Tensor
    block: int

    @classmethod
    def of(cls, group: Group, count: Tensor, left_out: Tensor, block: int) -> "_Step":
        """count: of the steps, this one included; a step that is left out may be the first, and is then not used."""
        beta1, beta2 = group["beta1"], group["beta2"]
        bias1, bias2 = (1 - beta ** count.double().clamp(min=1) for beta in (beta1, beta2))
        kept = 1 - group["lr"] * group["weight_decay"]
        return cls((beta1, beta2), group["epsilon"], kept, -group["lr"] / bias1, bias2.sqrt(), left_out, block)

    def take(self, weight: Tensor, gradient: Tensor, mean: _Moment, square: _Moment) -> None:
        """Updates a part of a parameter and its moments; weight and gradient: [values]."""
        beta1, beta2 = self.betas
        m = dequantize(*mean, signed=True, block=self.block).mul_(beta1).add_(gradient, alpha=1 - beta1)
        v = dequantize(*square, signed=False, block=self.block).mul_(beta2)
        v.addcmul_(gradient, gradient, value=1 - beta2)
        mean.keep(m, self.left_out, self.block, signed=True)
        square.keep(v, self.left_out, self.block, signed=False)
        change = m.mul_(self.rate).div_(v.sqrt_().div_(self.root).add_(self.eps))
        torch.where(self.left_out, weight, change.add_(weight * self.kept), out=weight)


class _Map(NamedTuple):
    """values: float32 [256], rising; code_of_step: uint8 [65536], the nearest of a step of the grid; zero: its code."""

    values: Tensor
    code_of_step: Tensor
    zero: int

    @classmethod
    def of(cls, values: Tensor) -> "_Map":
        steps = torch.arange(GRID + 1, dtype=torch.float32).mul_(2).div_(GRID).sub_(1)
        codes = torch.bucketize(steps, (values[:-1] + values[1:]) / 2)
        return cls(values, codes.to(torch.uint8), int((values == 0).nonzero()))


_MAPS = {signed: _Map.of(dynamic_map(signed=signed)) for signed in (True, False)}


@cache
def _map_on(signed: bool, device: torch.device) -> _Map:
    values, code_of_step, zero = _MAPS[signed]
    return _Map(values.to(device), code_of_step.to(device), zero)


def _map(signed: bool, beside: Tensor) -> _Map:
    """On the device of `beside`; without values where that has none, as in a plan, and then kept by nobody."""
    if isinstance(beside, FakeTensor):
        values, code_of_step, zero = _MAPS[signed]
        return _Map(
            beside.new_empty(values.shape, dtype=values.dtype),
            beside.new_empty(code_of_step.shape, dtype=code_of_step.dtype),
            zero,
        )
    return _map_on(signed, beside.device)


ADAM8BIT = adam8bit()
