"""LoKr: a Kronecker product of a small matrix and a larger one, which is a low-rank product where that is smaller."""

from math import isqrt

import torch
from torch import Tensor
from torch.nn import Parameter

from luthier.adapters.base import Additive, PeftForm, Start
from luthier.adapters.starts import kaiming_uniform
from luthier.kernels.kronecker import add_kronecker

__all__ = ["LoKr", "factorization"]


class LoKr(Additive):
    """h = W x + (alpha / r) (C kron D) x        Yeh et al. 2023 (LyCORIS), section 3.2; Edalati et al. 2022

    C: [l, m], D: [k, n], with l k = out and m n = in. D is low-rank where r is under half of its larger side, C too if
    decompose_both asks for it; so r may be above the layer's size, and then both are whole.
    """

    peft = PeftForm(
        "LOKR",
        {
            **{name: name for name in ("r", "alpha", "target_modules", "layers_to_transform", "modules_to_save")},
            **{name: name for name in ("rank_pattern", "alpha_pattern", "decompose_both", "decompose_factor")},
        },
    )

    def create(self) -> None:
        self.r = self.settings.rank_of(self.name)
        self.scale = self.settings.scale_of(self.name)
        small, large = zip(
            factorization(self.out_features, self.settings.decompose_factor),
            factorization(self.in_features, self.settings.decompose_factor),
            strict=True,
        )
        self._make("lokr_w1", small, whole=not self.settings.decompose_both)
        self._make("lokr_w2", large, whole=False)

    def _make(self, name: str, shape: tuple[int, int], *, whole: bool) -> None:
        """Makes a factor's parameters: one matrix, or the two thin ones that it is a product of."""
        (rows, columns), r = shape, self.r
        whole = whole or 2 * r >= max(shape)
        parts = {name: shape} if whole else {f"{name}_a": (rows, r), f"{name}_b": (r, columns)}
        for part, size in parts.items():
            self.register_parameter(part, Parameter(torch.zeros(size, device=self.device)))

    @torch.no_grad()
    def initialize(self, start: Start) -> None:
        """As PEFT: uniform in +-1/sqrt(columns), but for C, or the first factor of it, which is zero."""
        for name, parameter in self.named_parameters():
            if name not in ("lokr_w1", "lokr_w1_a"):
                parameter.copy_(kaiming_uniform(tuple(parameter.shape), start.generator))

    def _factor(self, name: str) -> Tensor:
        own = dict(self.named_parameters())
        return own[name] if name in own else own[f"{name}_a"] @ own[f"{name}_b"]

    def _factors(self) -> tuple[Tensor, Tensor]:
        """C and D."""
        return self._factor("lokr_w1"), self._factor("lokr_w2")

    def add(self, x: Tensor, output: Tensor | None) -> Tensor:
        return add_kronecker(output, x, *self._factors(), self.scale)

    @torch.no_grad()
    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A row of C at a time, for a block of rows of the weight."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        c, d = (factor.to(wide) for factor in self._factors())
        merged = torch.empty_like(weight)
        for row, old, new in zip(c, weight.split(len(d)), merged.split(len(d)), strict=True):
            new.copy_(old.to(wide) + (self.scale * torch.kron(row[None], d)).to(weight.device))
        return merged, bias


def factorization(size: int, largest: int) -> tuple[int, int]:
    """Two factors of `size`: `largest` and the rest if it divides, else the nearest pair whose smaller one is at most
    `largest`, the smaller one first; -1 sets no bound.
    """
    if largest > 0 and size % largest == 0:
        return largest, size // largest
    bound = isqrt(size) if largest == -1 else min(largest, isqrt(size))
    smaller = next(factor for factor in range(bound, 0, -1) if size % factor == 0)
    return smaller, size // smaller
