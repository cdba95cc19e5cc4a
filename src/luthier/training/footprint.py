"""What a training step holds in memory, counted without holding it.

The step runs on tensors that have a shape and no values (PyTorch's fake tensors), and the bytes of every storage are
counted from the operation that makes it until it is released. So whatever a step is made of (adapters, checkpointed
layers, fused kernels, an optimizer's moments) is counted by being run; no formula has to be kept in step with the code.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from luthier.data.batches import TokenBatch
from luthier.objectives.loss import Loss
from luthier.training.state import TrainState

__all__ = ["Footprint", "LiveBytes", "step_footprint"]


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of tensors. weights: the network's; masters: float32 copies of narrow ones that are trained; gradients and
    optimizer: what stays from one micro-batch to the next; activations: the most that a micro-batch needs besides.
    """

    weights: int
    masters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def peak_bytes(self) -> int:
        """All of it at the worst moment."""
        return self.weights + self.masters + self.gradients + self.optimizer + self.activations


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations within the context make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """These are counted elsewhere."""
        self._known.update(t.untyped_storage()._cdata for t in tensors)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def step_footprint(
    state: TrainState, batch: TokenBatch, objective: Callable[[nn.Module, TokenBatch], Loss]
) -> Footprint:
    """The footprint of any step but the first, while its largest micro-batch `batch` runs: gradients of earlier
    micro-batches and the optimizer's moments are there already. `state` holds fake tensors; its mode must be active.
    """
    trained = list(state.trained().values())
    state.hold_all()
    network = list(state.network.parameters()) + list(state.network.buffers())
    moments = [v for values in state.optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
    gradients = [p.grad for p in trained if p.grad is not None]
    counter = LiveBytes()
    counter.ignore([*network, *trained, *gradients, *moments])
    with counter:
        loss = objective(state.network, batch)
        (loss.per_unit.sum() / batch.count(loss.unit)).backward()
    return Footprint(
        weights=_bytes(network),
        masters=_bytes([*network, *trained]) - _bytes(network),
        gradients=_bytes(gradients),
        optimizer=_bytes(moments),
        activations=counter.peak,
    )


def _bytes(tensors: Sequence[Tensor]) -> int:
    """Of the storages, each once however many tensors look at it."""
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())
