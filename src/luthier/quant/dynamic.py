"""The dynamic 8-bit type: 256 values, dense near zero, that blocks of numbers share by a scale of their own.

NF4's scales and an 8-bit optimizer's moments are kept in it. What rounds to a code is looked up on a grid, as
bitsandbytes' CPU library (0.50) does.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["GRID", "SMALLEST", "dynamic_map", "in_blocks"]

GRID = 65535  # steps from -1 to 1 to which a value is rounded before its code is looked up
SMALLEST = 1e-38  # stands for a block's largest value where all are zero


def dynamic_map(*, signed: bool) -> Tensor:
    """The 256 values, rising        Dettmers et al. 2022, 8-bit optimizers, section 2

    The number i of leading zeros, and 6 - i bits of fraction (7 - i where no bit is a sign): 10^-i times the middles of
    2^(6-i) equal parts of [0.1, 1]. To these come 0 and 1.
    """
    num_bits = 6 if signed else 7
    decades = []
    for zeros in reversed(range(7)):
        edges = torch.linspace(0.1, 1, 2 ** (num_bits - zeros) + 1, dtype=torch.float32)
        decades.append((edges[:-1] + edges[1:]) / 2 * 10**-zeros)
    positive = torch.cat(decades)
    negative = -positive.flip(0) if signed else positive[:0]
    return torch.cat((negative, positive.new_zeros(1), positive, positive.new_ones(1)))


def in_blocks(flat: Tensor, size: int) -> Tensor:
    """In rows of `size`, the last filled up with zeros. flat: [values]."""
    missing = -flat.numel() % size
    return (pad(flat, (0, missing)) if missing else flat).view(-1, size)
