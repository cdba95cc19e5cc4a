"""LoRA: a frozen layer plus a trained product of two thin matrices.

Where A and B start from parts of the weight itself (pissa, olora, loftq), the weight must be without these parts. A
base that stays as it is keeps them, and the update takes them off again: so its file is a LoRA of twice the rank on the
original model, which anybody can load. A base that is going to be quantized is quantized without them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from luthier.adapters.adapted import Base
from luthier.adapters.base import Adapter, Additive, PeftForm, Start
from luthier.adapters.starts import Factors, gaussian, kaiming_uniform, loftq, olora, pissa
from luthier.errors import AdapterError
from luthier.kernels.low_rank import add_low_rank

__all__ = ["LoRA", "checked_rank", "plus_product"]

_MERGED_ROWS = 256  # of a weight at a time, so that merging a layer takes little more than the merged layer


class LoRA(Additive):
    """h = W x + (alpha / r) B A x        Hu et al. 2021, eq. 3; with rs_scaling alpha / sqrt(r), Kalajdzievski 2023"""

    taken_A: Tensor | None
    taken_B: Tensor | None
    peft = PeftForm(
        "LORA",
        {
            **{name: name for name in ("r", "target_modules", "layers_to_transform", "modules_to_save", "bias")},
            **{name: name for name in ("rank_pattern", "alpha_pattern")},
            **{"alpha": "lora_alpha", "dropout": "lora_dropout", "rs_scaling": "use_rslora"},
        },
        {"use_dora": False, "fan_in_fan_out": False},
    )
    file_names: ClassVar = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "bias": "base_layer.bias"}

    def create(self) -> None:
        self.r = checked_rank(self, self.settings.rank_of(self.name))
        self.scale = self.settings.scale_of(self.name)
        self.lora_A = Parameter(torch.zeros(self.r, self.in_features, device=self.device))
        self.lora_B = Parameter(torch.zeros(self.out_features, self.r, device=self.device))
        bias = self.place.bias if self.settings.bias != "none" else None
        self.bias = None if bias is None else Parameter(bias.detach().to(torch.float32, copy=True))
        remembers = self.settings.takes_parts
        self.register_buffer("taken_A", torch.zeros_like(self.lora_A.detach()) if remembers else None)
        self.register_buffer("taken_B", torch.zeros_like(self.lora_B.detach()) if remembers else None)

    def initialize(self, start: Start) -> None:
        """A as PEFT draws it: uniform in +-1/sqrt(in) (kaiming, a = sqrt 5), or normal with deviation 1/r. B = 0.
        Or both from the weight, and what they took remembered.
        """
        init, shape = self.settings.init, tuple(self.lora_A.shape)
        if self.settings.takes_parts:
            now, taken = self._from_weight(start)
            _copy((self.lora_A, self.lora_B), now)
            _copy((self.taken_A, self.taken_B), taken)
            return
        a = kaiming_uniform(shape, start.generator)
        if init == "gaussian":
            a = gaussian(shape, 1 / self.r, start.generator)
        _copy((self.lora_A, self.lora_B), (a, torch.zeros(())))

    def _from_weight(self, start: Start) -> tuple[Factors, Factors]:
        """Where A and B start, and what the weight is without."""
        weight: Tensor = self.place.weight.detach()
        if self.settings.init != "loftq":
            make = pissa if self.settings.init == "pissa" else olora
            factors = make(weight, self.r, self.scale, start.generator)
            return factors, factors
        if start.rounding is None:
            raise AdapterError("init: loftq makes good what quantizing takes away; set quantize_base: nf4 or int8")
        iterations = self.settings.iterations
        return loftq(weight, self.r, self.scale, start.generator, rounding=start.rounding, iterations=iterations)

    def add(self, x: Tensor, output: Tensor | None) -> Tensor:
        updated = self._add_product(x, output)
        return updated if self.bias is None else updated + (self.bias - self.place.bias).to(updated.dtype)

    def _add_product(self, x: Tensor, output: Tensor | None) -> Tensor:
        dropped = torch.nn.functional.dropout(x, self.settings.dropout, self.training)
        a, b = self._factors()
        return add_low_rank(output, dropped, a, b, self.scale)

    def _factors(self) -> Factors:
        """A and B, with what they took taken off where the base still has it."""
        if self.taken_A is None or self.taken_B is None or self.stripped:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.taken_A]), torch.cat([self.lora_B, -self.taken_B], dim=1)

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        if self.bias is not None:
            return None
        a, b = self._factors()
        return a, b * self.scale

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            a, b = self._factors()
            if bias is not None and self.bias is not None:
                bias = (bias + (self.bias - self.place.bias)).to(bias.dtype)
            return plus_product(weight, a, b, self.scale), bias

    def strip(self, weight: Tensor) -> Tensor:
        """Without what the start took."""
        if self.taken_A is None or self.taken_B is None:
            return weight
        self.stripped = True
        return plus_product(weight, self.taken_A, self.taken_B, -self.scale)

    def restore(self, weight: Tensor) -> Tensor:
        if not self.stripped or self.taken_A is None or self.taken_B is None:
            return weight
        return plus_product(weight, self.taken_A, self.taken_B, self.scale)

    def base_alone(self, x: Tensor, base: Base, *, onto: Tensor | None = None) -> Tensor:
        whole: Tensor = base(x, onto=onto)
        if not self.stripped or self.taken_A is None or self.taken_B is None:
            return whole
        return add_low_rank(whole, x, self.taken_A, self.taken_B, self.scale)

    def saved(self) -> dict[str, Tensor]:
        """A LoRA on the original weight: with what was taken off, of twice the rank."""
        kept = super().saved()
        if self.taken_A is not None and self.taken_B is not None:
            kept[self.key("lora_A")] = torch.cat([self.lora_A, self.taken_A]).detach()
            kept[self.key("lora_B")] = torch.cat([self.lora_B, -self.taken_B], dim=1).detach()
        return kept

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        if self.taken_A is None:
            super().fill(tensors)
            return
        a, b = tensors[self.key("lora_A")], tensors[self.key("lora_B")]
        _copy((self.lora_A, self.lora_B), (a[: self.r], b[:, : self.r]))
        _copy((self.taken_A, self.taken_B), (a[self.r :], -b[:, self.r :]))
        if self.bias is not None:
            _copy((self.bias,), (tensors[self.key("bias")],))

    @classmethod
    def peft_words(cls, settings: Any, adapters: Sequence[Any]) -> dict[str, object]:
        """With what was taken off, the ranks are twice as high and the strength stays."""
        if not settings.takes_parts:
            return {"init_lora_weights": "gaussian" if settings.init == "gaussian" else True}
        growth = 2**0.5 if settings.rs_scaling else 2
        return {
            "r": 2 * settings.r,
            "lora_alpha": growth * settings.alpha,
            "rank_pattern": {key: 2 * r for key, r in settings.rank_pattern.items()},
            "alpha_pattern": {key: growth * alpha for key, alpha in settings.alpha_pattern.items()},
        }

    def rate_ratios(self) -> dict[str, float]:
        """B's, which LoRA+ sets above 1 (Hayou et al. 2024, section 4)."""
        return {"lora_B": self.settings.lr_ratio_b}


def checked_rank(adapter: Adapter, r: int) -> int:
    """The rank, if the layer is as large. Raises AdapterError."""
    most = min(adapter.in_features, adapter.out_features)
    if r > most:
        raise AdapterError(f"{adapter.name}: r: {r} is above the layer's size; at most {most}, or leave the layer out")
    return r


@torch.no_grad()
def plus_product(weight: Tensor, a: Tensor, b: Tensor, scale: float, norms: Tensor | None = None) -> Tensor:
    """W + scale * B A in the weight's type, formed in float32 or wider and rounded once, a few rows at a time.

    norms: [out], to which the rows are then scaled.
    """
    wide, result = torch.promote_types(weight.dtype, torch.float32), torch.empty_like(weight)
    a = a.to(wide)
    for first in range(0, len(weight), _MERGED_ROWS):
        rows = slice(first, first + _MERGED_ROWS)
        new = weight[rows].to(wide) + (scale * (b[rows].to(wide) @ a)).to(weight.device)
        if norms is not None:
            new *= (norms[rows].to(wide) / torch.linalg.vector_norm(new, dim=1))[:, None]
        result[rows] = new
    return result


@torch.no_grad()
def _copy(into: Any, values: Any) -> None:
    for target, value in zip(into, values, strict=True):
        target.copy_(value)
