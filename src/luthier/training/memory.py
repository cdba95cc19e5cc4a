"""How much memory the process holds and may hold, and how the C library is told to keep it."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from torch import nn

from luthier.shortage import function_of_c, on_release, release_freed_memory

if sys.platform == "linux":
    import resource

__all__ = [
    "available_bytes",
    "keep_freed_memory",
    "memory_bytes",
    "resident_bytes",
    "resident_in_files",
    "within_free_memory",
]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_COMPILED_PRODUCTS = "384"  # oneDNN keeps 1024, at 0.6 MB each; a run with STREAM_MULTIPLE meets about 300


def memory_bytes(network: nn.Module) -> int:
    """The most bytes in use so far: on a GPU by the allocator's count, on the CPU of the process's resident set."""
    device = next(network.parameters()).device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _of_status("VmHWM") if sys.platform == "linux" else resident_bytes()


def _of_status(name: str) -> int:
    """A number of bytes that Linux keeps of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024


def resident_bytes() -> int:
    """The process's resident set now."""
    return int(psutil.Process().memory_info().rss)


def resident_in_files(suffix: str) -> int:
    """Of it, the pages of mapped files whose names end so; 0 where the system does not tell."""
    if sys.platform != "linux":
        return 0
    return sum(int(m.rss) for m in psutil.Process().memory_maps() if m.path.endswith(suffix))


def available_bytes(device: torch.device) -> int:
    """What a run may hold in all: on the CPU what the process holds and what is free, within its control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    bound = resident_bytes() + psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup/memory.max")
    limit = group.read_text().strip() if group.exists() else "max"
    return bound if limit == "max" else min(bound, int(limit))


@contextmanager
def within_free_memory(device: torch.device, free_bytes: int | None = None) -> Iterator[None]:
    """Within the context an allocation fails that the machine has no memory for, where Linux would promise it and kill
    the process once it is used. On a GPU, and elsewhere than on Linux, allocations fail by themselves, or cannot be
    made to.

    free_bytes: what is free; None to look. A lower bound of the user's (`ulimit -d`) stays. The system counts addresses
    and no pages, and holes of the heap have addresses whose pages were given back. In the beginning they count as free
    memory that is there already, for tensors go into them. Once memory has run out the bound is set anew without them,
    or what is larger than each could never be had; what fills them then comes on top.
    """
    if sys.platform != "linux" or device.type != "cpu":
        yield
        return
    bounds = resource.getrlimit(resource.RLIMIT_DATA)
    given = [one for one in bounds if one != resource.RLIM_INFINITY]
    in_all = None if free_bytes is None else resident_bytes() + free_bytes

    def bind(holes: int = 0) -> None:
        free = (available_bytes(device) if in_all is None else in_all) - resident_bytes()
        bound = _of_status("VmData") + free - holes
        resource.setrlimit(resource.RLIMIT_DATA, (min(bound, *given) if given else bound, bounds[1]))

    release_freed_memory()
    bind(_bytes_in_holes())
    try:
        with on_release(bind):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, bounds)


def keep_freed_memory() -> None:
    """Lets glibc reuse the pages of freed tensors instead of giving them back and faulting them in again: 5% faster.

    And lets oneDNN keep fewer of the matrix products that it compiles. To be called before the first of them.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _COMPILED_PRODUCTS)
    mallopt = function_of_c("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


class _MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names.split(" "))


def _bytes_in_holes() -> int:
    """What the heap has free; 0 where the C library does not tell."""
    told = function_of_c("mallinfo2")
    if told is None:
        return 0
    told.restype = _MallInfo
    return int(told().fordblks)
