"""A stream: sequences end to end without padding, and how it is cut into segments.

A segment stands alone, or goes on where another ends, as each of several answers goes on where their prompt ends. So
what sequences have in common is stored and computed once. Pieces are joined, and no index tensors used: where one piece
goes to many places, its gradient is then summed in one order, on every device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

__all__ = ["STREAM_MULTIPLE", "Segments", "put_before_each", "take_out"]

# A CPU compiles its matrix products for each size that it meets and keeps them, 0.6 MB and 2 ms apiece, and blocks of
# ever new sizes leave holes: 15 steps left 600 MB behind. A GPU's allocator, too, holds what it cannot use again. So
# who makes a stream makes it a multiple of this long.
STREAM_MULTIPLE = 32


@dataclass(frozen=True, slots=True)
class Segments:
    """lengths: tokens of each segment, in the stream's order. parents: for each the number of the earlier segment that
    it goes on from, which itself stands alone; None where it begins a sequence.
    """

    lengths: tuple[int, ...]
    parents: tuple[int | None, ...]

    def __post_init__(self) -> None:
        assert len(self.lengths) == len(self.parents), "each segment has one entry in parents"
        roots = {i for i, parent in enumerate(self.parents) if parent is None}
        assert all(p is None or (p < i and p in roots) for i, p in enumerate(self.parents)), "a parent stands alone"

    @classmethod
    def alone(cls, lengths: Sequence[int]) -> "Segments":
        """Whole sequences."""
        return cls(tuple(lengths), (None,) * len(lengths))

    @property
    def slices(self) -> list[slice]:
        """Where each segment lies."""
        return [slice(stop - n, stop) for stop, n in zip(accumulate(self.lengths), self.lengths, strict=True)]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        before = (0 if parent is None else self.lengths[parent] for parent in self.parents)
        return max(n + b for n, b in zip(self.lengths, before, strict=True))

    def and_one_more(self, length: int) -> "Segments":
        """With another sequence at the end."""
        return Segments((*self.lengths, length), (*self.parents, None))

    def longer_by(self, num_rows: int) -> "Segments":
        """With so many tokens more at the beginning of each sequence."""
        longer = [n + num_rows * (parent is None) for n, parent in zip(self.lengths, self.parents, strict=True)]
        return Segments(tuple(longer), self.parents)


def put_before_each(rows: Tensor, stream: Tensor, segments: Segments, *, dim: int, num_behind: int = 0) -> Tensor:
    """The rows before every sequence of the stream, along `dim`, and so many zeros behind the last.

    rows: like the stream but for their number.
    """
    pieces: list[Tensor] = []
    for piece, parent in zip(stream.split(list(segments.lengths), dim), segments.parents, strict=True):
        pieces += [rows, piece] if parent is None else [piece]
    if num_behind:
        pieces.append(stream.new_zeros(*stream.shape[:dim], num_behind, *stream.shape[dim + 1 :]))
    return torch.cat(pieces, dim)


def take_out(stream: Tensor, num_rows: int, segments: Segments, *, dim: int) -> Tensor:
    """The sequences alone again: without the rows before each, and without what stands behind the last."""
    sizes: list[int] = []
    for length, parent in zip(segments.lengths, segments.parents, strict=True):
        sizes += [num_rows if parent is None else 0, length]
    behind = stream.shape[dim] - sum(sizes)
    return torch.cat(stream.split([*sizes, behind], dim)[1::2], dim)
