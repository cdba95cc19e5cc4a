"""Tensors that a backward pass forms again from others that it keeps anyhow.

The output of a norm or of a gate is what the linear layers behind it read, and where these are trained, or carry an
adapter, their gradients need it. Forming it again costs a pass over memory and no matrix product. So who makes such a
tensor says of what and how, and who would keep it keeps that instead: a third of what a LoRA step keeps.
"""

from collections.abc import Callable
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

__all__ = ["can_be_formed_again", "to_keep"]


class _Recipe:
    """Forms a tensor again: once for all who wait for it, and it stays until the last has had it."""

    def __init__(self, form: Callable[..., Tensor]) -> None:
        self.form = form
        self.waiting = 0
        self.formed: Tensor | None = None

    def again(self, *tensors: Tensor, shape: torch.Size) -> Tensor:
        formed = self.form(*tensors) if self.formed is None else self.formed
        self.waiting -= 1
        self.formed = formed if self.waiting > 0 else None
        return formed.view(shape)


class _Origin:
    """What a tensor was formed of; and its version, which tells whether it was written to afterwards."""

    def __init__(self, made: Tensor, recipe: _Recipe, tensors: tuple[Tensor, ...]) -> None:
        self.version, self.num_elements = made._version, made.numel()
        self.recipe, self.tensors = recipe, tensors

    def is_of(self, tensor: Tensor) -> bool:
        whole = tensor.is_contiguous() and tensor.numel() == self.num_elements
        return whole and tensor._version == self.version


_ORIGINS: WeakKeyDictionary[torch.UntypedStorage, _Origin] = WeakKeyDictionary()
"""Of the tensors that live."""


def can_be_formed_again(made: Tensor, form: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Notes that form(*tensors) gives `made` again, bit for bit, and returns `made`, which is dense. tensors: what the
    backward pass keeps in any case; no copies are made.
    """
    _ORIGINS[made.untyped_storage()] = _Origin(made, _Recipe(form), tuple(t.detach() for t in tensors))
    return made


def to_keep(tensor: Tensor) -> tuple[tuple[Tensor, ...], Callable[..., Tensor]]:
    """What to save for the backward pass, and the function that makes `tensor` of it there: of the tensor itself,
    unless it can be formed again. Once saved, it is to be made once.
    """
    origin = _ORIGINS.get(tensor.untyped_storage())
    if origin is None or not origin.is_of(tensor):
        return (tensor,), _itself
    origin.recipe.waiting += 1
    return origin.tensors, partial(origin.recipe.again, shape=tensor.shape)


def _itself(tensor: Tensor) -> Tensor:
    return tensor
