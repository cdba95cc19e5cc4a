"""Rotary positions: halves of a head turned by angles that grow with the token's place."""

import torch
from torch import Tensor

__all__ = ["rotated"]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[x1 cos - x2 sin, x2 cos + x1 sin], x1 and x2 being a head's halves        Su et al. 2021, eq. 34

    In the order of GPT-NeoX and transformers. x: [..., heads, head size]. cos, sin: [..., 1, head size / 2]. No
    gradient.
    """
    first, second = x.chunk(2, dim=-1)
    turned = torch.empty_like(x, memory_format=torch.contiguous_format)
    half = x.shape[-1] // 2
    torch.mul(first, cos, out=turned[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=turned[..., half:]).addcmul_(first, sin)
    return turned
