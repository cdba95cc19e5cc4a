"""Eight-bit floats, rounded as hardware rounds them, and the scales that make the most of them.

A tensor is multiplied by a scale that moves its greatest entry to the format's greatest number, and rounded; what lies
beyond is set to that number, never to infinity. E4M3 has the precision that the forward pass wants, E5M2 the range of
gradients. The scale comes from the tensor itself, or, delayed, from the greatest entries of the last steps. Windows and
scales are tensors where the network is: nothing here waits for a device.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["E4M3", "E5M2", "ROLES", "AmaxWindows", "Float8", "codes_of", "greatest_of", "scale_for"]

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

ROLES = {"input": E4M3, "weight": E4M3, "gradient": E5M2}
"""What of a linear layer is rounded, and to which format        Micikevicius et al. 2022, section 3"""


class Float8(NamedTuple):
    """codes / scale. codes: a matrix of one of the formats. scale: float32, a number."""

    codes: Tensor
    scale: Tensor

    @property
    def T(self) -> "Float8":
        """Transposed."""
        return Float8(self.codes.T, self.scale)

    def dense(self) -> Tensor:
        """The numbers meant, in float32."""
        return self.codes.float() / self.scale


def scale_for(amax: Tensor, form: torch.dtype, margin: int = 0) -> Tensor:
    """greatest number of the format / amax / 2^margin        Micikevicius et al. 2022, section 4

    amax: of any shape, float32. 1 where there is nothing to go by: amax is zero, not finite, or so small that float32
    cannot hold the scale.
    """
    scale = torch.finfo(form).max / 2**margin / amax
    return torch.where((amax > 0) & amax.isfinite() & scale.isfinite(), scale, 1.0)


def codes_of(values: Tensor, scale: Tensor, form: torch.dtype) -> Tensor:
    """round(clamp(scale * v, -greatest, greatest)), to the nearest number of the format and ties to even.

    values: any shape and type. scale: a number, float32. What is not a number stays so.
    """
    greatest = torch.finfo(form).max
    return (values.float() * scale).clamp_(-greatest, greatest).to(form)


def greatest_of(values: Tensor) -> Tensor:
    """max |v|, a number in float32: 0 of nothing, and nan where something is none."""
    if values.numel() == 0:
        return torch.zeros((), device=values.device)
    least, most = torch.aminmax(values.detach())
    return torch.maximum(-least, most).float()


class AmaxWindows(nn.Module):
    """The greatest entries of one layer's input, weight and gradient in its last `length` steps, and the scales that
    they ask for.

    delayed: a scale follows from the steps before, and from the tensor at hand while there are none; a tensor that
    outgrows them is cut off until the window knows of it. Otherwise it follows from the tensor at hand. A step begins
    with `begin`, and only `end` moves the windows: so all micro-batches have the same delayed scales, and running a
    layer once more changes nothing. Without training or gradients nothing is noted.
    """

    seen: Tensor  # [roles, length], the newest first; 0 before anything was seen
    amax: Tensor  # [roles], of the step
    counts: Tensor  # [roles, 2], of the step: entries cut off, and all

    def __init__(
        self, *, length: int, delayed: bool = True, margin: int = 0, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.delayed, self.margin = delayed, margin
        made = {
            "seen": torch.zeros(len(ROLES), length, device=device),
            "amax": torch.zeros(len(ROLES), device=device),
            "counts": torch.zeros(len(ROLES), 2, dtype=torch.int64, device=device),
        }
        for name, tensor in made.items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def notes(self) -> bool:
        """Whether what is quantized now belongs to a step of training."""
        return self.training and torch.is_grad_enabled()

    def quantize(self, role: str, values: Tensor, *, noted: bool) -> Float8:
        """The values as the role's format holds them. noted: they belong to the step.

        Where one of them is infinite or no number, none of the codes is: clamped, an overflow would pass for a number.
        """
        amax, form = greatest_of(values), ROLES[role]
        scale = torch.where(amax.isfinite(), self._scale(role, amax), torch.nan)
        if noted:
            self._note(list(ROLES).index(role), amax, values, scale, form)
        return Float8(codes_of(values, scale, form), scale)

    def scales(self) -> Tensor:
        """By the windows and the step so far, [roles]; nan where nothing was seen."""
        known = ((self.amax > 0) & self.amax.isfinite()) | (self.delayed & (self.seen.amax(1) > 0))
        scales = torch.stack([self._scale(role, self.amax[i]) for i, role in enumerate(ROLES)])
        return torch.where(known, scales, torch.nan)

    def shares_cut_off(self) -> Tensor:
        """Of the step's entries, by role, [roles]: those that the greatest number stands for although more than half
        a step of the format lies between.
        """
        return self.counts[:, 0] / self.counts[:, 1].clamp_min(1)

    def begin(self) -> None:
        """A step begins."""
        self.amax.zero_()
        self.counts.zero_()

    def end(self) -> None:
        """The step's greatest entries join the windows, those that are finite, and the oldest leave them. A layer that
        was not run keeps its window.
        """
        joins = self.amax.isfinite() & (self.counts[:, 1] > 0)
        longer = torch.cat([self.amax[:, None], self.seen], 1)[:, :-1]
        self.seen.copy_(torch.where(joins[:, None], longer, self.seen))

    def _scale(self, role: str, amax: Tensor) -> Tensor:
        asked = amax
        if self.delayed:
            greatest = self.seen[list(ROLES).index(role)].amax()
            asked = torch.where(greatest > 0, greatest, amax)
        return scale_for(asked, ROLES[role], self.margin)

    def _note(self, row: int, amax: Tensor, values: Tensor, scale: Tensor, form: torch.dtype) -> None:
        self.amax[row] = torch.maximum(self.amax[row], amax)
        beyond = (values.detach().float() * scale).abs_() > _rounded_down_to_greatest(form)
        self.counts[row, 0] += beyond.count_nonzero()
        self.counts[row, 1] += values.numel()


def _rounded_down_to_greatest(form: torch.dtype) -> float:
    """The greatest number of the format and half a step: up to here it is the nearest."""
    found = torch.finfo(form)
    return float(found.max + found.eps * 2.0 ** math.floor(math.log2(found.max)) / 2)
