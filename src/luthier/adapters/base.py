"""What an adapter is, and the layer that carries several of them.

An adapter of one linear layer writes two formulas: `forward(x, base)`, where `base` is a callable so that bf16, NF4
and INT8 weights look alike to it, and `merge(weight, bias)`, which is pure, so that unmerging is keeping the
original. Everything else (injection, switching, saving, merging a whole model) is written once, against this
interface. Adapters that do not sit on one linear layer (prefix, prompt, bottleneck) will attach per block or per
model; those that change their rank while they train will be called once a step through `after_step`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from luthier.errors import AdapterError
from luthier.recipe.adapters import AdapterSettings

__all__ = ["AdaptedLinear", "Adapter", "Base"]

Base = Callable[[Tensor], Tensor]


class Adapter(nn.Module, ABC):
    """A change to one linear layer. Starts as the identity: a new adapter changes no output."""

    def __init__(self, linear: nn.Linear, settings: AdapterSettings, *, name: str) -> None:
        """`name` is the layer's dotted name in the model: errors speak of it, and patterns match it."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.device = linear.weight.device
        self.settings, self.name = settings, name
        self.create()

    @abstractmethod
    def create(self) -> None:
        """Makes the parameters, in float32, under the names that PEFT's files use; `initialize` fills them."""

    @abstractmethod
    def initialize(self, generator: torch.Generator) -> None:
        """Fills the parameters from the generator, so that the adapter is the identity."""

    @abstractmethod
    def forward(self, x: Tensor, base: Base) -> Tensor:
        """x: [tokens, in] -> [tokens, out]. `base(x)` returns a tensor of its own, which may be written into."""

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight [out, in] and bias [out] of the one linear layer that equals base and adapter together. Pure."""
        raise AdapterError(
            f"{self.name}: an adapter of type {self.settings.type} cannot be merged; keep it beside the model"
        )

    def after_step(self, step: int) -> None:
        """Called once after each optimizer step, for adapters whose rank or importance changes while they train."""


class AdaptedLinear(nn.Module):
    """A linear layer with any number of named adapters, of which those in `active` apply, one around the other.

    The base layer keeps its own name and parameters, so that taking the adapters away is putting `base` back.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.adapters: nn.ModuleDict = nn.ModuleDict()
        self.active: tuple[str, ...] = ()

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, for code that looks at a linear layer's type or device."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]."""
        if not self.active:
            result: Tensor = self.base(x)
            return result
        apply: Base = self.base
        for name in self.active:
            apply = partial(self.adapters[name], base=apply)
        return apply(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with the active adapters merged in; the base stays as it is."""
        weight: Tensor = self.base.weight
        bias: Tensor | None = self.base.bias
        for name in self.active:
            adapter = self.adapters[name]
            assert isinstance(adapter, Adapter)
            weight, bias = adapter.merge(weight, bias)
        return weight, bias
