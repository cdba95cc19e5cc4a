"""Weights in NF4: blocks of 64 share one scale, each weight is the nearest of sixteen levels, and scales take 8 bits.

The levels are quantiles of a normal distribution, since trained weights are nearly normal: eight from the positive
half, seven from the negative one and zero, divided by the largest. The scales are quantized once more (double
quantization), which leaves 4.127 bits a weight. Codes, scales and values are bit for bit those of bitsandbytes' CPU
library (0.50); what it does at the edges (a last block that is not full, a scale between two steps) is done here too.
Weights pass through in parts, so that what is held besides codes and result does not grow with the layer.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from luthier.quant.dynamic import GRID, SMALLEST, dynamic_map, in_blocks
from luthier.quant.parts import weights_at_once

__all__ = ["BLOCK", "LEVELS", "NF4", "compress_scales", "dequantize_blocks", "expand_scales", "quantize_blocks"]

BLOCK = 64  # weights that share a scale
SCALES_BLOCK = 256  # scales that share a scale of theirs

LEVELS = (  # Dettmers et al. 2023, appendix E
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class NF4(NamedTuple):
    """w = level[code] * s,  s = dynamic[code of s] * absmax + offset        Dettmers et al. 2023, section 3

    codes: [weights / 2] uint8, two to a byte, the first in the high half. scale_codes: [blocks] uint8.
    absmax: [blocks / 256] float32, of the scales less their mean. offset: [] float32, that mean.
    """

    codes: Tensor
    scale_codes: Tensor
    absmax: Tensor
    offset: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> "NF4":
        """weight: any floating type and shape, read in its order of rows."""
        codes, scales = quantize_blocks(weight)
        return cls(codes, *compress_scales(scales))

    def dense(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The weight that is meant, computed in float32 and rounded to `dtype` once."""
        return dequantize_blocks(self.codes, expand_scales(*self[1:]), shape, dtype)


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest level of w / absmax for each weight, packed, and each block's absmax in float32 [blocks].

    Of two levels equally near, the lower. An odd last half byte holds the code of zero.
    """
    flat = weight.flatten()
    parts = [_quantize_part(part) for part in flat.split(weights_at_once(flat.device))]
    codes, scales = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return codes[: (flat.numel() + 1) // 2].clone(), scales


def _quantize_part(flat: Tensor) -> tuple[Tensor, Tensor]:
    full = flat.numel() % BLOCK == 0
    blocks = in_blocks(flat.float(), BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = blocks * absmax.clamp(min=SMALLEST).reciprocal()[:, None]
    if not full:  # bitsandbytes divides here, which rounds otherwise than multiplying by the reciprocal
        absmax[-1].clamp_(min=SMALLEST)
        scaled[-1] = blocks[-1] / absmax[-1]
    codes = torch.bucketize(scaled, _constant("bounds", flat), out_int32=True).to(torch.uint8)
    return (codes[:, 0::2] << 4 | codes[:, 1::2]).flatten(), absmax


def dequantize_blocks(codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """level[code] * scale. codes: packed. scales: float32 [blocks]. Both levels of a byte are looked up as one."""
    pairs, rows = _constant("pairs", codes), in_blocks(codes, BLOCK // 2)
    dense = codes.new_empty((rows.shape[0], BLOCK), dtype=dtype)
    num_blocks = weights_at_once(codes.device) // BLOCK
    for part, packed, scale in zip(*(t.split(num_blocks) for t in (dense, rows, scales)), strict=True):
        levels = pairs.index_select(0, packed.flatten().int()).view(torch.float32)
        part.copy_(levels.view(-1, BLOCK).mul_(scale[:, None]))
    return dense.flatten()[: shape.numel()].view(shape)


def compress_scales(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales less their mean in blocks of 256, each the dynamic map's nearest value times the block's absmax.

    scales: float32 [blocks]. Returns scale_codes, absmax and offset as `NF4` has them. Nearest is meant up to a grid
    of 65,536 values from -1 to 1, as bitsandbytes' CPU library means it. Without the grid 0.15% of normal numbers would
    get another code, whose value is nearer by a step of the grid at most.
    """
    offset = scales.mean()
    blocks = in_blocks(scales - offset, SCALES_BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = blocks * absmax.clamp(min=SMALLEST).reciprocal()[:, None]
    steps = ((scaled.clamp_(-1, 1) + 1) * 0.5 * GRID + 0.5).floor_()
    codes = torch.bucketize(steps.mul_(2).div_(GRID).sub_(1), _constant("scale_bounds", scales))
    codes = codes.masked_fill_(absmax[:, None] == 0, 0).to(torch.uint8)
    return codes.flatten()[: scales.numel()].clone(), absmax, offset


def expand_scales(codes: Tensor, absmax: Tensor, offset: Tensor) -> Tensor:
    """The scales [blocks] in float32 that `compress_scales` stored."""
    values = _constant("dynamic", codes).index_select(0, codes.int())
    return in_blocks(values, SCALES_BLOCK).mul(absmax[:, None]).add_(offset).flatten()[: codes.numel()]


def _constants() -> dict[str, Tensor]:
    """pairs: for each byte its two float32 levels in the 8 bytes of one int64, gathered three times as fast as rows of
    two. Bounds lie midway between values.
    """
    levels, dynamic = torch.tensor(LEVELS, dtype=torch.float32), dynamic_map(signed=True)
    pairs = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), 1)
    return {
        "bounds": (levels[:-1] + levels[1:]) / 2,
        "pairs": pairs.view(torch.int64).flatten(),
        "dynamic": dynamic,
        "scale_bounds": (dynamic[:-1] + dynamic[1:]) / 2,
    }


_CONSTANTS = _constants()


@cache
def _constant_on(name: str, device: torch.device) -> Tensor:
    return _CONSTANTS[name].to(device)


def _constant(name: str, beside: Tensor) -> Tensor:
    """On the device of `beside`; without values where that has none, as in a plan, and then kept by nobody."""
    if isinstance(beside, FakeTensor):
        return beside.new_empty(_CONSTANTS[name].shape, dtype=_CONSTANTS[name].dtype)
    return _constant_on(name, beside.device)
