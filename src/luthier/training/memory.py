"""How much memory this process holds, on the device that it trains on."""

import psutil
import torch
from torch import nn

__all__ = ["memory_bytes"]


def memory_bytes(network: nn.Module) -> int:
    """Bytes in use: on a GPU what the allocator has handed out at its peak, on the CPU the resident set of the
    process.
    """
    device = next(network.parameters()).device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
