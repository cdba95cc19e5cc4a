"""Activations kept in the machine's memory while they wait for the backward pass, and brought back for it.

A GPU computes the layers behind them meanwhile. What is a parameter, or looks at one, stays where it is, and so do
small tensors, whose copies would cost more than they free.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["activations_on_host", "host_copy"]

_SMALLEST_BYTES = 2**20

Packed = Tensor | tuple[torch.device, Tensor]


@contextmanager
def activations_on_host(
    network: nn.Module, to_host: Callable[[Tensor], Tensor | None], *, smallest_bytes: int = _SMALLEST_BYTES
) -> Iterator[None]:
    """What operations within the context keep for the backward pass is kept as `to_host` gives it, and moved back to
    its device when it is asked for. to_host: None for a tensor that stays.
    """
    held = {tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers())}

    def pack(tensor: Tensor) -> Packed:
        stays = tensor.nbytes < smallest_bytes or tensor.untyped_storage()._cdata in held
        moved = None if stays else to_host(tensor)
        return tensor if moved is None else (tensor.device, moved)

    def unpack(packed: Packed) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed[1].to(packed[0], non_blocking=True, copy=True)

    with saved_tensors_hooks(pack, unpack):
        yield


def host_copy(tensor: Tensor) -> Tensor | None:
    """A copy in pinned memory of a tensor on a GPU, on its way while the GPU goes on; None for one that is not."""
    if tensor.device.type == "cpu":
        return None
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)
