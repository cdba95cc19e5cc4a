"""DoRA: the magnitude of each row of the weight trained apart from its direction."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from luthier.adapters.adapted import Base, is_innermost
from luthier.adapters.base import PeftForm, Start
from luthier.adapters.lora import LoRA, plus_product

__all__ = ["DoRA"]


class DoRA(LoRA):
    """h = m (W + s B A) x / |W + s B A| + b, the norm taken of each row        Liu et al. 2024, eq. 5

    The norm counts as a constant in the backward pass (section 4.3). It is found from the factors, without a dense
    weight: |W + s B A|^2 = |W|^2 + 2 s (W A') . B + s^2 (B A A') . B in each row. Dropout acts on the update alone.
    """

    peft = PeftForm("LORA", LoRA.peft.fields, {"use_dora": True, "fan_in_fan_out": False})
    file_names: ClassVar = {**LoRA.file_names, "magnitude": "lora_magnitude_vector"}

    def create(self) -> None:
        super().create()
        self.magnitude = Parameter(torch.zeros(self.out_features, device=self.device))
        self._squares: Tensor | None = None

    def initialize(self, start: Start) -> None:
        """As LoRA; the magnitudes are the norms, of the weight as it will be rounded."""
        super().initialize(start)
        weight = self.place.weight.detach()
        with torch.no_grad():
            self.magnitude.copy_(_row_squares(start.rounding(weight) if start.rounding else weight).sqrt())

    def move(self, place: nn.Module) -> None:
        super().move(place)
        self._squares = None

    def forward(self, x: Tensor, base: Base, *, onto: Tensor | None = None) -> Tensor:
        bias = self._bias_of(base, x)
        direction = super().forward(x, base)
        if bias is not None:
            direction = direction - bias
        output = direction * (self.magnitude / self._norms(base, bias, x.dtype)).to(x.dtype)
        if bias is not None and self.bias is not None:
            bias = bias + (self.bias - self.place.bias)
        if bias is not None:
            output = output + bias.to(output.dtype)
        return output if onto is None else onto.add_(output)

    def add(self, x: Tensor, output: Tensor | None) -> Tensor:
        """The product alone: the bias has no part in the direction."""
        return self._add_product(x, output)

    def low_rank(self) -> None:
        """The magnitudes turn each row's length too."""

    def _bias_of(self, base: Base, x: Tensor) -> Tensor | None:
        """Of the layer, or of the layer under other adapters."""
        if is_innermost(base, self.place):
            bias: Tensor | None = self.place.bias
            return bias
        of_nothing: Tensor = base(x.new_zeros(1, self.in_features))
        return of_nothing[0]

    @torch.no_grad()
    def _norms(self, base: Base, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """|W + s B A| of each row, [out], in float32 or wider; W is what `base` multiplies by."""
        a, b = self.lora_A, self.lora_B
        projected = base(a.to(dtype))
        projected = (projected if bias is None else projected - bias).to(b.dtype)
        mixed = 2 * self.scale * projected.T + self.scale**2 * (b @ (a @ a.T))
        squares: Tensor = self._squares_of(base, bias, dtype) + (mixed * b).sum(1)
        return squares.clamp_min_(0).sqrt_()

    def _squares_of(self, base: Base, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """|W|^2 of each row: of a bare layer found once."""
        if not is_innermost(base, self.place):
            dense: Tensor = base(torch.eye(self.in_features, device=self.lora_A.device, dtype=dtype))
            return _row_squares((dense if bias is None else dense - bias).T)
        if self._squares is None or self._squares.device != self.lora_A.device:
            self._squares = _row_squares(self.place.weight)
        return self._squares

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        _, bias = super().merge(weight[:0], bias) if self.bias is not None else (weight, bias)
        return plus_product(weight, self.lora_A, self.lora_B, self.scale, self.magnitude), bias

    def rate_ratios(self) -> dict[str, float]:
        """B's as in LoRA+, and the magnitudes'."""
        return {**super().rate_ratios(), "magnitude": self.settings.lr_ratio_magnitude}


@torch.no_grad()
def _row_squares(weight: Tensor) -> Tensor:
    """|w|^2 of each row, [out], in float32 or wider."""
    norms: Tensor = torch.linalg.vector_norm(weight.to(torch.promote_types(weight.dtype, torch.float32)), dim=1)
    return norms.square_()
