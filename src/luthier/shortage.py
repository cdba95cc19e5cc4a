"""What happens where memory runs out: the same work once more, with less of it at once.

PyTorch, NumPy and Python say it in different ways, and none says how much would have been there. The work must be such
that it can begin anew.
"""

import ctypes
import gc
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

__all__ = ["again_with_less", "function_of_c", "on_release", "ran_out", "release_freed_memory"]

_SIGNS = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")
_OF_ONEDNN = ("could not create a primitive", "could not create a memory object", "could not execute a primitive")

T = TypeVar("T")

_on_release: list[Callable[[], None]] = []


def ran_out(error: BaseException) -> bool:
    """Whether it says that there is no more memory, of the machine or of its GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and (said in _OF_ONEDNN or any(sign in said for sign in _SIGNS))


def _in_short(error: BaseException) -> str:
    """What was asked for where the error says it, else its first line."""
    asked = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
    return asked[0].lower() if asked else (str(error).splitlines() or [type(error).__name__])[0]


def again_with_less(work: Callable[[], T], give_way: Callable[[str], None]) -> T:
    """What `work` gives; each time that memory runs out in it `give_way`, told how, sees to it that it takes less, or
    raises where it cannot.
    """
    while True:
        try:
            return work()
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            said = _in_short(error)
        # Not in the clause above: the error's traceback holds the tensors of what failed.
        gc.collect()
        release_freed_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for action in _on_release:
            action()
        give_way(said)


@contextmanager
def on_release(action: Callable[[], None]) -> Iterator[None]:
    """Within the context `action` is done each time that memory has run out and what was freed has been given back."""
    _on_release.append(action)
    try:
        yield
    finally:
        _on_release.remove(action)


def release_freed_memory() -> None:
    """Gives the pages of freed tensors back, where other work follows."""
    trim = function_of_c("malloc_trim")
    if trim is not None:
        trim(0)


def function_of_c(name: str) -> "ctypes._NamedFuncPointer | None":
    """A function of glibc; other C libraries may not have it."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
