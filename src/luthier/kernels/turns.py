"""The turns of a loop over parts of a tensor, of which a memory plan needs only the largest.

A turn gives back what it takes. Where it takes no less than another one that is nowhere greater, by the sizes that the
loop names, only the greatest tell how many bytes the loop needs. A plan's operations cost a hundred microseconds each
whatever their size, and those of the loops over blocks of queries and rows of logits are three of every four.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["counting_bytes", "slices", "turns"]

T = TypeVar("T")

_counting = ContextVar("_counting", default=False)


@contextmanager
def counting_bytes() -> Iterator[None]:
    """Loops over tensors without values may leave turns out."""
    token = _counting.set(True)
    try:
        yield
    finally:
        _counting.reset(token)


def turns(parts: Sequence[T], sizes: Callable[[T], tuple[int, ...]], *, over: Tensor) -> Sequence[T]:
    """The parts; where bytes are counted, and `over` has no values, only those that none covers in all of its sizes.

    sizes: all that a turn's bytes grow with; of two parts with equal ones the turns take the same.
    """
    if not (_counting.get() and isinstance(over, FakeTensor)):
        return parts
    by_sizes = {sizes(part): part for part in parts}
    return [part for own, part in by_sizes.items() if not any(_covers(other, own) for other in by_sizes)]


def slices(length: int, at_once: int) -> list[slice]:
    """So many places at once, the last ones fewer."""
    return [slice(i, min(i + at_once, length)) for i in range(0, length, at_once)]


def _covers(sizes: tuple[int, ...], others: tuple[int, ...]) -> bool:
    return sizes != others and all(one >= other for one, other in zip(sizes, others, strict=True))
