"""Eight-bit floats, exactly as hardware rounds them, in float32: for machines that have no such product.

A tensor is multiplied by a scale that moves its greatest entry to the format's greatest number, rounded, and divided
again; what lies beyond is set to that number, never to infinity. E4M3 has the precision that the forward pass wants,
E5M2 the range of gradients. The scale comes from the tensor itself, or, delayed, from the greatest entries of the last
steps, which spares a second look at it.
"""

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["E4M3", "E5M2", "AmaxWindow", "quantized", "scale_for"]

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def scale_for(amax: float, form: torch.dtype) -> float:
    """greatest number of the format / amax        Micikevicius et al. 2022, section 4

    1 where there is nothing to go by: amax is zero, not finite, or so small that float32 cannot hold the scale.
    """
    if not 0 < amax < float("inf"):
        return 1.0
    scale = torch.finfo(form).max / amax
    return scale if scale <= torch.finfo(torch.float32).max else 1.0


def quantized(values: Tensor, scale: float, form: torch.dtype) -> Tensor:
    """round(clamp(scale * v, -greatest, greatest)) / scale, to the nearest number of the format and ties to even.

    values: any shape, float32. What is not a number stays so.
    """
    greatest = torch.finfo(form).max
    return (values * scale).clamp(-greatest, greatest).to(form).to(values.dtype) / scale


@dataclass
class AmaxWindow:
    """The greatest entries of a tensor in its last `length` steps, and the scale that they ask for.

    delayed: the scale follows from the steps before; a tensor that outgrows them is cut off at the greatest number
    until they know of it. Otherwise it follows from the tensor at hand.
    """

    form: torch.dtype
    length: int = 16
    delayed: bool = True
    seen: deque[float] = field(init=False)

    def __post_init__(self) -> None:
        self.seen = deque(maxlen=self.length)

    @property
    def scale(self) -> float:
        """By the window as it is; 1 before anything was seen."""
        return scale_for(max(self.seen, default=0.0), self.form)

    def quantize(self, values: Tensor) -> Tensor:
        """The values as the format holds them; their greatest entry joins the window, if it is finite."""
        amax = float(values.detach().abs().amax()) if values.numel() else 0.0
        scale = self.scale if self.delayed and self.seen else scale_for(amax, self.form)
        if amax < float("inf"):
            self.seen.append(amax)
        return quantized(values, scale, self.form)
