"""LoHa: the product of two low-rank updates, element by element, of rank up to r squared."""

import torch
from torch import Tensor
from torch.nn import Parameter

from luthier.adapters.base import Additive, PeftForm, Start
from luthier.adapters.lora import checked_rank, plus_product
from luthier.adapters.starts import kaiming_uniform
from luthier.kernels.hadamard import Hadamard, add_hadamard, as_low_rank

__all__ = ["LoHa"]


class LoHa(Additive):
    """h = W x + (alpha / r) ((A1 B1) * (A2 B2)) x        Hyeon-Woo et al. 2021 (FedPara), proposition 1"""

    peft = PeftForm(
        "LOHA",
        {
            **{name: name for name in ("r", "alpha", "target_modules", "layers_to_transform", "modules_to_save")},
            **{name: name for name in ("rank_pattern", "alpha_pattern")},
        },
    )

    def create(self) -> None:
        r = checked_rank(self, self.settings.rank_of(self.name))
        self.scale = self.settings.scale_of(self.name)
        self.hada_w1_a, self.hada_w2_a = (self._zeros(self.out_features, r) for _ in range(2))
        self.hada_w1_b, self.hada_w2_b = (self._zeros(r, self.in_features) for _ in range(2))

    def _zeros(self, rows: int, columns: int) -> Parameter:
        return Parameter(torch.zeros(rows, columns, device=self.device))

    @torch.no_grad()
    def initialize(self, start: Start) -> None:
        """As PEFT: uniform in +-1/sqrt(columns), but for B2, which is zero."""
        for factor in (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a):
            factor.copy_(kaiming_uniform(tuple(factor.shape), start.generator))
        self.hada_w2_b.zero_()

    def _factors(self) -> Hadamard:
        return self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b

    def add(self, x: Tensor, output: Tensor | None) -> Tensor:
        return add_hadamard(output, x, self._factors(), self.scale)

    @torch.no_grad()
    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return plus_product(weight, *as_low_rank(self._factors()), self.scale), bias
