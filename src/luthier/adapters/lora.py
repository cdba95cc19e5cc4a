"""LoRA: a frozen layer plus a trained product of two thin matrices."""

import math

import torch
from torch import Tensor
from torch.nn import Parameter

from luthier.adapters.base import Adapter, Base
from luthier.errors import AdapterError
from luthier.kernels.low_rank import add_low_rank
from luthier.recipe.adapters import LoRA as LoRASettings

__all__ = ["LoRA"]

_MERGED_ROWS = 256  # of a weight at a time, so that merging a layer takes little more than the merged layer


class LoRA(Adapter):
    """h = W x + (alpha / r) B A x        Hu et al. 2021, eq. 3; with rs_scaling alpha / sqrt(r), Kalajdzievski 2023"""

    settings: LoRASettings

    def create(self) -> None:
        r, most = self.settings.r, min(self.in_features, self.out_features)
        if r > most:
            raise AdapterError(f"{self.name}: r: {r} is above the layer's size; at most {most}, or leave the layer out")
        self.lora_A = Parameter(torch.zeros(r, self.in_features, device=self.device))
        self.lora_B = Parameter(torch.zeros(self.out_features, r, device=self.device))
        self.scale = self.settings.alpha / (math.sqrt(r) if self.settings.rs_scaling else r)

    def initialize(self, generator: torch.Generator) -> None:
        """A as PEFT draws it: uniform in +-1/sqrt(in) (kaiming, a = sqrt 5), or normal with deviation 1/r. B = 0."""
        start = torch.empty(self.lora_A.shape)
        if self.settings.init == "gaussian":
            start.normal_(std=1 / self.settings.r, generator=generator)
        else:
            bound = 1 / math.sqrt(self.in_features)
            start.uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            self.lora_A.copy_(start)
            self.lora_B.zero_()

    def forward(self, x: Tensor, base: Base) -> Tensor:
        dropped = torch.nn.functional.dropout(x, self.settings.dropout, self.training)
        return add_low_rank(base(x), dropped, self.lora_A, self.lora_B, self.scale)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        wide, merged = torch.promote_types(weight.dtype, torch.float32), torch.empty_like(weight)
        a = self.lora_A.to(wide)
        with torch.no_grad():
            for new, old, b in zip(*(t.split(_MERGED_ROWS) for t in (merged, weight, self.lora_B)), strict=True):
                new.copy_(old.to(wide) + (self.scale * (b.to(wide) @ a)).to(old.device))
        return merged, bias
