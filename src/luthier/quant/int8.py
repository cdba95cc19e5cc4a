"""Weights in INT8: each output's row shares one scale, its largest weight, and each weight is a step of 127 up to it.

Codes, scales and values are bit for bit those of bitsandbytes (LLM.int8()). Its other half, which takes outliers among
the activations apart, concerns products of integers; here products run on the dequantized weight and need no such care.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from luthier.quant.parts import weights_at_once

__all__ = ["INT8"]


class INT8(NamedTuple):
    """w = code * absmax / 127        Dettmers et al. 2022, LLM.int8(), section 3.1

    codes: [out, in] int8, from -127 to 127. absmax: [out] float32.
    """

    codes: Tensor
    absmax: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> "INT8":
        """weight: [out, in], any floating type. A row whose largest weight is under 4e-37 becomes zero."""
        lowest, highest = weight.aminmax(dim=1)
        absmax = torch.maximum(-lowest, highest).float()
        factors = (127.0 / absmax).nan_to_num_(posinf=0.0)[:, None]
        codes = weight.new_empty(weight.shape, dtype=torch.int8)
        rows = _rows_at_once(weight)
        for part, dense, factor in zip(*(t.split(rows) for t in (codes, weight, factors)), strict=True):
            part.copy_((dense.float() * factor).round_())
        return cls(codes, absmax)

    def dense(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The weight that is meant, computed in float32 and rounded to `dtype` once."""
        dense = self.codes.new_empty(shape, dtype=dtype)
        rows = _rows_at_once(self.codes)
        for part, codes, absmax in zip(*(t.split(rows) for t in (dense, self.codes, self.absmax)), strict=True):
            part.copy_(codes.float().mul_(absmax[:, None]).mul_(1 / 127))
        return dense


def _rows_at_once(matrix: Tensor) -> int:
    return max(1, weights_at_once(matrix.device) // matrix.shape[1])
