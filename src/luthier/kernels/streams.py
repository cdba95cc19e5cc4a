"""Sequences end to end in one stream, and rows of the same kind before each of them.

Pieces are joined, and no index tensors used: where one piece goes to many places, its gradient is then summed in one
order, on every device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["STREAM_MULTIPLE", "put_before_each", "take_out"]

# A CPU compiles its matrix products for each size that it meets and keeps them, 0.6 MB and 2 ms apiece, and blocks of
# ever new sizes leave holes: 15 steps left 600 MB behind. A GPU's allocator, too, holds what it cannot use again. So
# who makes a stream makes it a multiple of this long.
STREAM_MULTIPLE = 32


def put_before_each(rows: Tensor, stream: Tensor, lengths: Sequence[int], *, dim: int, num_behind: int = 0) -> Tensor:
    """The rows before every sequence of the stream, and so many zeros behind the last.

    lengths: of the sequences, along `dim`, in order. rows: like the stream but for their number.
    """
    pieces = [piece for sequence in stream.split(list(lengths), dim) for piece in (rows, sequence)]
    if num_behind:
        pieces.append(stream.new_zeros(*stream.shape[:dim], num_behind, *stream.shape[dim + 1 :]))
    return torch.cat(pieces, dim)


def take_out(stream: Tensor, num_rows: int, lengths: Sequence[int], *, dim: int) -> Tensor:
    """The sequences alone again: without the rows before each, and without what stands behind the last."""
    sizes = [size for length in lengths for size in (num_rows, length)]
    behind = stream.shape[dim] - sum(sizes)
    return torch.cat(stream.split([*sizes, behind], dim)[1::2], dim)
