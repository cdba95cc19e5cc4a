"""Parameters of the model itself that an adapter trains: whole modules, biases, single biases of linear layers.

The adapter trains a copy, so the model stays as it is: switched off, the original is used, and nothing has to be put
back. A copy is saved with the adapter under the name that it has in the model, as PEFT does it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from luthier.adapters.adapted import Base, is_innermost
from luthier.adapters.base import Adapter, Additive, Start
from luthier.adapters.targets import linear_targets
from luthier.errors import AdapterError

__all__ = ["BiasCopy", "BitFit", "ModuleCopy"]


class ModuleCopy(Adapter):
    """The module's formula with trained copies of its parameters."""

    def create(self) -> None:
        self.names = self.copied()
        if not self.names:
            raise AdapterError(f"modules_to_save: {self.name} has no parameters of its own; name modules inside it")
        for name in self.names:
            original = getattr(self.place, name).detach()
            self.register_parameter(name, Parameter(original.to(torch.float32, copy=True)))

    @property
    def sees_rows(self) -> bool:
        return False

    def copied(self) -> list[str]:
        """The parameters that are copied: all that the module itself has."""
        return [name for name, _ in self.place.named_parameters(recurse=False)]

    def initialize(self, start: Start) -> None:
        """The copies are what the module has."""

    def forward(self, *inputs: Any, base: Base, onto: Tensor | None = None, **options: Any) -> Any:
        if not is_innermost(base, self.place):
            raise AdapterError(f"{self.name}: is trained whole by two adapters at once; switch one of them off")
        own = {name: self._as_used(name) for name in self.names}
        result = torch.func.functional_call(self.place, own, inputs, options)
        return result if onto is None else onto.add_(result)

    def _as_used(self, name: str) -> Tensor:
        original: Tensor = getattr(self.place, name)
        return self.get_parameter(name).to(original.dtype)

    def parameter(self, name: str, value: Tensor) -> Tensor:
        return self._as_used(name) if name in self.names else value

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        own = {name: p.detach() for name, p in self.named_parameters()}
        new_bias = None if bias is None else own.get("bias", bias).to(bias.dtype)
        return own.get("weight", weight).to(weight.dtype), new_bias


class BiasCopy(ModuleCopy):
    """The module's formula with a trained copy of its bias."""

    def copied(self) -> list[str]:
        return ["bias"]


class BitFit(Additive):
    """h = W x + b with b trained alone        Ben Zaken et al. 2021, section 3

    A linear layer without a bias gets one, which starts at zero.
    """

    @classmethod
    def places(cls, network: nn.Module, settings: Any) -> dict[str, nn.Module]:
        return linear_targets(network, settings.target_modules)

    def create(self) -> None:
        bias = self.place.bias
        start = torch.zeros(self.out_features, device=self.device) if bias is None else bias.detach()
        self.bias = Parameter(start.to(torch.float32, copy=True))

    @property
    def mergeable(self) -> bool:
        """Only where the architecture has a bias."""
        return self.place.bias is not None

    def initialize(self, start: Start) -> None:
        """The bias is that of the layer, or zero."""

    def add(self, x: Tensor, output: Tensor | None) -> Tensor:
        change = self.bias if self.place.bias is None else self.bias - self.place.bias
        if output is None:
            return change.to(x.dtype).expand(len(x), -1).clone()
        return output + change.to(output.dtype)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        own, before = self.bias.detach(), self.place.bias
        if bias is None:
            return weight, own.to(weight.dtype)
        return weight, (bias + (own if before is None else own - before)).to(bias.dtype)
