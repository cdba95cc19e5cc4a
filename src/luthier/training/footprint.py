"""What a training step holds in memory, counted without holding it.

The step runs on tensors that have a shape and no values (PyTorch's fake tensors), and the bytes of every storage are
counted from the operation that makes it until it is released. So whatever a step is made of (adapters, checkpointed
layers, fused kernels, an optimizer's moments) is counted by being run; no formula has to be kept in step with the code.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from luthier.data.batches import TokenBatch
from luthier.kernels.turns import counting_bytes
from luthier.objectives.loss import Loss
from luthier.training.offload import activations_on_host
from luthier.training.state import TrainState

__all__ = ["Footprint", "LiveBytes", "PassBytes", "held_bytes", "pass_bytes", "step_footprint"]


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

    def leave(self, tensor: Tensor) -> None:
        """This one lies elsewhere from now on."""
        storage = tensor.untyped_storage()
        self._forget(storage._cdata, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        if key in self._known:
            self._known.discard(key)
            self.live -= size


@dataclass(frozen=True, slots=True)
class PassBytes:
    """Of a forward and backward pass, besides what was there before: kept: between the two; peak: at its worst."""

    kept: int
    peak: int


def step_footprint(
    state: TrainState, batch: TokenBatch, objective: Callable[[nn.Module, TokenBatch], Loss]
) -> Footprint:
    """The footprint of any step but the first, while its largest micro-batch `batch` runs. `state` holds fake tensors;
    its mode must be active.
    """
    held = held_bytes(state)
    return replace(held, activations=pass_bytes(state, batch, objective).peak)


def held_bytes(state: TrainState) -> Footprint:
    """What any step but the first holds before its last micro-batch: gradients of earlier ones and the optimizer's
    moments are there already; activations are none. `state` holds fake tensors; its mode must be active.
    """
    state.hold_all()
    network, trained, gradients, moments = _held(state)
    return Footprint(
        weights=_bytes(network),
        masters=_bytes([*network, *trained]) - _bytes(network),
        gradients=_bytes(gradients),
        optimizer=_bytes(moments),
        activations=0,
    )


def pass_bytes(
    state: TrainState,
    batch: TokenBatch,
    objective: Callable[[nn.Module, TokenBatch], Loss],
    *,
    offloaded: bool = False,
) -> PassBytes:
    """What a micro-batch needs besides what is held. `state` holds fake tensors, as `hold_all` makes them; its mode
    must be active. offloaded: what waits for the backward pass does not count.
    """
    counter = LiveBytes()
    counter.ignore([tensor for part in _held(state) for tensor in part])

    def gone(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        counter.leave(copy)
        return copy

    with counter, counting_bytes():
        with activations_on_host(state.network, gone) if offloaded else nullcontext():
            loss = objective(state.network, batch)
        mean = loss.per_unit.sum() / batch.count(loss.unit)
        kept = counter.live
        mean.backward()
    return PassBytes(kept, counter.peak)


def _held(state: TrainState) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """The network's tensors, what is trained, its gradients and the optimizer's moments."""
    network = [*state.network.parameters(), *state.network.buffers()]
    trained: list[Tensor] = [*state.trained().values()]
    gradients = [p.grad for p in trained if p.grad is not None]
    moments = [v for values in state.optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
    return network, trained, gradients, moments


def _bytes(tensors: Sequence[Tensor]) -> int:
    """Of the storages, each once however many tensors look at it."""
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())
