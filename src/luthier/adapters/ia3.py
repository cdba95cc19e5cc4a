"""IA3: one learned factor for every column that attention and feed-forward blocks hand on."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from luthier.adapters.adapted import Base
from luthier.adapters.base import Adapter, PeftForm, Start
from luthier.errors import AdapterError

__all__ = ["IA3"]


class IA3(Adapter):
    """h = l * (W x + b); in feed-forward layers h = W (l * x) + b        Liu et al. 2022, section 3.3"""

    peft = PeftForm(
        "IA3",
        {name: name for name in ("target_modules", "feedforward_modules", "modules_to_save")},
        {"fan_in_fan_out": False},
    )

    @classmethod
    def places(cls, network: nn.Module, settings: Any) -> dict[str, nn.Module]:
        """Raises AdapterError besides for a feed-forward layer that is not one of the targets."""
        chosen = super().places(network, settings)
        for wanted in settings.feedforward_modules:
            if not any(_fits(wanted, path) for path in chosen):
                short = sorted({path.rpartition(".")[2] for path in chosen})
                raise AdapterError(
                    f'feedforward_modules: no adapted layer is named "{wanted}"; name some of {", ".join(short)}'
                )
        return chosen

    def create(self) -> None:
        self.feedforward = any(_fits(name, self.name) for name in self.settings.feedforward_modules)
        shape = (1, self.in_features) if self.feedforward else (self.out_features, 1)
        self.ia3_l = Parameter(torch.zeros(shape, device=self.device))

    def initialize(self, start: Start) -> None:
        """All factors are 1."""
        nn.init.ones_(self.ia3_l)

    def forward(self, x: Tensor, base: Base, *, onto: Tensor | None = None) -> Tensor:
        factors = self.ia3_l.flatten().to(x.dtype)
        if self.feedforward:
            whole: Tensor = base(x * factors, onto=onto)
            return whole
        output: Tensor = base(x) * factors
        return output if onto is None else onto.add_(output)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        factors = self.ia3_l.detach().to(weight.device)  # [out, 1] or [1, in], float32 or wider
        if bias is not None and not self.feedforward:
            bias = (bias * factors.flatten()).to(bias.dtype)
        return (weight * factors).to(weight.dtype), bias

    @classmethod
    def peft_words(cls, settings: Any, adapters: Sequence[Any]) -> dict[str, object]:
        """PEFT wants the feed-forward names among the targets, letter by letter, or else as a pattern: where the layers
        are written by their whole names, a pattern it is.
        """
        names = settings.feedforward_modules
        targets = () if isinstance(settings.target_modules, str) else settings.target_modules
        whole = settings.layers_to_transform is not None or any("." in name for name in (*targets, *names))
        pattern = rf"(.*\.)?({'|'.join(map(re.escape, names))})"
        return {"feedforward_modules": pattern if whole and names else list(names)}


def _fits(wanted: str, path: str) -> bool:
    """As targets are matched: a dotted name or its end."""
    return path == wanted or path.endswith(f".{wanted}")
