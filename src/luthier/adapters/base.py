"""What an adapter is.

Most adapters sit on one linear layer and write two formulas: `forward(x, base)`, where `base` is a callable so that
bf16, NF4 and INT8 weights look alike to it, and `merge(weight, bias)`, which is pure, so that unmerging is keeping the
original. Others sit on a sublayer, on an embedding or on the whole decoder, and take what that module takes. Which
modules a type sits on, `places` says. Everything else (injection, switching, mixing, saving, merging a whole model) is
written once, against this interface.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from luthier.adapters.adapted import Base
from luthier.adapters.targets import Linear, linear_targets
from luthier.errors import AdapterError
from luthier.recipe.adapters import AnyAdapter

__all__ = ["Adapter", "Additive", "PeftForm", "Start", "Step"]


@dataclass(frozen=True, slots=True)
class Start:
    """What start values may be made from.

    generator: belongs to the seed and the place. network: with the weights that the adapter will stand beside.
    rounding: what quantizing the base will make of a weight, where it is going to be quantized. encode: token ids.
    """

    generator: torch.Generator
    network: nn.Module
    rounding: Callable[[Tensor], Tensor] | None = None
    encode: Callable[[str], list[int]] | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """An optimizer step, counted from 0, of so many, in a run of this seed."""

    index: int
    num_steps: int
    seed: int


@dataclass(frozen=True, slots=True)
class PeftForm:
    """How PEFT's adapter_config.json says a type's settings. kind: its peft_type. fields: our name -> PEFT's.

    fixed: what else is written, and must be said by a file for it to be of this type; what is false may be missing.
    unread: words that change nothing of what a saved adapter of this type computes. borrowed: the form is another
    type's, as which PEFT's own files are read; only metadata of ours says this type.
    """

    kind: str
    fields: Mapping[str, str]
    fixed: Mapping[str, object] = field(default_factory=dict)
    unread: frozenset[str] = frozenset()
    borrowed: bool = False


class Adapter(nn.Module, ABC):
    """A change to one module. Starts as the identity: a new adapter changes no output.

    `forward(x, base, onto)` on a linear layer, x: [tokens, in] -> [tokens, out], and added to `onto` where that is a
    tensor and not None; elsewhere it takes what the module takes, and `base`. What `base` returns is a tensor of its
    own, which may be written into, as `onto` may.
    """

    peft: ClassVar[PeftForm | None] = None  # None for a type that PEFT does not have
    file_names: ClassVar[Mapping[str, str]] = {}  # of parameters whose name in PEFT's file is another
    optional_keys: ClassVar[frozenset[str]] = frozenset()  # what PEFT's file may hold besides
    stripped: bool = False  # whether the base was stored without a part of its weight, which this adapter has

    def __init__(
        self, place: nn.Module, settings: AnyAdapter, *, name: str, config: PretrainedConfig | None = None
    ) -> None:
        """`name` is the module's dotted name in the model: errors speak of it, and patterns match it. config: of the
        model, for adapters that need more than the module says.
        """
        super().__init__()
        self.settings: Any = settings
        self.name, self.config = name, config
        self._place = (place,)  # in a tuple, so that the module is no part of this one
        self.device = next((t.device for t in (*place.parameters(), *place.buffers())), torch.device("cpu"))
        if isinstance(place, Linear):
            self.in_features, self.out_features = place.in_features, place.out_features
        self.create()

    @property
    def sees_rows(self) -> bool:
        """Whether it changes each row of a linear layer's input by itself, so that a share of it, or some rows with it,
        make sense.
        """
        return isinstance(self.place, Linear)

    @property
    def place(self) -> Any:
        """The module of the model that the adapter sits on, without adapters."""
        return self._place[0]

    def move(self, place: nn.Module) -> None:
        """Sits on another form of the same module, as quantizing makes one."""
        self._place = (place,)

    @classmethod
    def places(cls, network: nn.Module, settings: Any) -> dict[str, nn.Module]:
        """The modules that the settings put an adapter on, by dotted name: linear layers for most types."""
        return linear_targets(network, settings.target_modules, settings.layers_to_transform)

    @abstractmethod
    def create(self) -> None:
        """Makes the parameters, in float32, under the names that PEFT's files use; `initialize` fills them."""

    @classmethod
    def share(cls, adapters: Sequence[Any], network: nn.Module, stored: Mapping[str, Tensor]) -> None:
        """Called once for all adapters of this type that are put on a network, to give them what they have in common.
        stored: the file that they are read from, if any.
        """

    @abstractmethod
    def initialize(self, start: Start) -> None:
        """Fills the parameters, so that the adapter is the identity."""

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """A [r, in] and B [out, r] where all that it does to a linear layer without dropout is h = W x + B A x, as it
        now is; else None.
        """
        return None

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight [out, in] and bias [out] of the one linear layer that equals base and adapter together. Pure."""
        raise AdapterError(
            f"{self.name}: an adapter of type {self.settings.type} cannot be merged into the weights; keep it beside "
            "the model and name both (--model, --adapter)"
        )

    @property
    def mergeable(self) -> bool:
        """Whether `merge` can give one layer for base and adapter."""
        return type(self).merge is not Adapter.merge

    def merged_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what `merge` gives for a weight or a bias of this one."""
        return shape

    def strip(self, weight: Tensor) -> Tensor:
        """The weight [out, in] that is to be quantized under this adapter, which from then on counts on it."""
        return weight

    def restore(self, weight: Tensor) -> Tensor:
        """A stripped weight [out, in] with what was taken off it; any other as it is. Pure."""
        return weight

    def base_alone(self, x: Tensor, base: Base, *, onto: Tensor | None = None) -> Tensor:
        """What `base` gives where this adapter does not apply: with what a stripped one is without."""
        whole: Tensor = base(x, onto=onto)
        return whole

    def parameter(self, name: str, value: Tensor) -> Tensor:
        """What stands for a parameter of the module, for code that reads it instead of calling the module."""
        return value

    def key(self, name: str) -> str:
        """Under which key PEFT's file has a parameter."""
        return f"base_model.model.{self.name}.{self.file_names.get(name, name)}"

    def saved(self) -> dict[str, Tensor]:
        """What the adapter's file holds, by key."""
        return {self.key(name): p.detach() for name, p in self.named_parameters()}

    def fit(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Takes from a file's shapes what the settings leave open, before the two are compared."""

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `saved`."""
        for name, parameter in self.named_parameters():
            parameter.copy_(tensors[self.key(name)])

    @classmethod
    def peft_words(cls, settings: Any, adapters: Sequence[Any]) -> dict[str, object]:
        """What PEFT's configuration says besides the settings, or otherwise than they do."""
        return {}

    def rate_ratios(self) -> dict[str, float]:
        """By what the learning rate of a parameter is multiplied, where that is not 1."""
        return {}

    @classmethod
    def before_step(cls, adapters: Sequence[Any], step: Step) -> None:
        """Called with all adapters of this type before each step's first forward pass."""

    @classmethod
    def penalty(cls, adapters: Sequence[Any]) -> Tensor | None:
        """What all adapters of this type add to the loss of a step, once; None for nothing."""
        return None

    @classmethod
    def after_step(cls, adapters: Sequence[Any], step: Step) -> None:
        """Called with all adapters of this type after each optimizer step, while the gradients are there."""


class Additive(Adapter):
    """An adapter of linear layers with a part of the form h = W x + f(x), for most types the whole.

    In float32 the layer comes first and f(x) is added to what it gives. In fewer bits f(x) comes first, and the layer's
    product is added to it before it is rounded (`kernels.linear.linear_onto`): beside a rounded W x most of a small
    f(x) would be lost. In bfloat16 small is what is below 1/256 to 1/512 of an output, as most is that young adapters
    change.
    """

    @abstractmethod
    def add(self, x: Tensor, output: Tensor | None) -> Tensor:
        """output + f(x), [tokens, out], written into `output` if that is cheaper; f(x) where there is none."""

    def forward(self, x: Tensor, base: Base, *, onto: Tensor | None = None) -> Tensor:
        """x: [tokens, in] -> [tokens, out]."""
        if onto is None and not _in_few_bits(x):
            return self.add(x, base(x))
        whole: Tensor = base(x, onto=self.add(x, onto))
        return whole


def _in_few_bits(x: Tensor) -> bool:
    """Whether layers called with x give few bits. Under autocast they do for any x, and choose their types
    themselves.
    """
    return x.dtype.itemsize < 4 and not torch.is_autocast_enabled(x.device.type)
