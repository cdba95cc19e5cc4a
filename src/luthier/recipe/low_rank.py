"""Settings of the adapters whose update has a rank."""

import math
import re
from typing import Annotated, Any, ClassVar, Literal, Self

from annotated_types import Ge, Gt, Lt
from pydantic import AfterValidator, Field, model_validator

from luthier.recipe.adapter import Dropout, OnLinear, Positive
from luthier.recipe.problems import Problem, Problems
from luthier.recipe.settings import Count, Word

__all__ = ["AdaLoRA", "DoRA", "DyLoRA", "LoHa", "LoKr", "LoRA", "LowRank", "VeRA"]


def _compiled(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f'"{pattern}" is no pattern of layer names ({error})') from None
    return pattern


def _factor(number: int) -> int:
    if number == -1 or number >= 2:
        return number
    raise ValueError(f"expected at least 2, or -1 for the most equal factors, got {number}")


_Pattern = Annotated[Word, AfterValidator(_compiled)]


def _customary_alpha(fields: dict[str, Any]) -> float:
    return 16.0 if fields.get("rs_scaling") else 2.0 * fields.get("r", 0)


class LowRank(OnLinear):
    """What adapters with a rank know."""

    r: Count = 16
    """The rank of the update."""

    rank_pattern: dict[_Pattern, Count] = Field(default={})
    """Another rank for some layers, by the end of their names: `down_proj: 32`."""

    alpha_pattern: dict[_Pattern, Positive] = Field(default={})
    """Another alpha for some layers, by the end of their names."""

    def rank_of(self, layer: str) -> int:
        """The rank of a layer, by its dotted name."""
        return next((r for key, r in self.rank_pattern.items() if _fits(key, layer)), self.r)


def _fits(pattern: str, layer: str) -> bool:
    """As PEFT matches: the pattern is the name's end, after a dot."""
    return re.fullmatch(rf"(.*\.)?({pattern})", layer) is not None


def _alpha_of(settings: Any, layer: str) -> float:
    alphas: dict[str, float] = settings.alpha_pattern
    return next((alpha for key, alpha in alphas.items() if _fits(key, layer)), float(settings.alpha))


class _LoRALike(LowRank):
    """What LoRA and DoRA share."""

    dropout: Dropout = 0.0
    """The share of the adapter's inputs that is dropped while training."""

    rs_scaling: bool = False
    """Scales by alpha / sqrt(r) instead of alpha / r, so that high ranks learn as fast (Kalajdzievski 2023)."""

    alpha: Positive = Field(default_factory=_customary_alpha)
    """The update's strength; by default 2 r (Biderman et al. 2024), or 16 with rs_scaling, which grows with r."""

    bias: Literal["all", "lora_only", "none"] = "none"
    """Which biases of the model are trained besides: all, those of the adapted layers, or none."""

    lr_ratio_b: Positive = 1.0
    """How many times A's learning rate B learns with; LoRA+ (Hayou et al. 2024) takes 16."""

    @property
    def takes_parts(self) -> bool:
        """Whether it starts from parts of the weight, which the weight must then be without."""
        return False

    def scale_of(self, layer: str) -> float:
        """alpha / r of a layer, or alpha / sqrt(r)."""
        r = self.rank_of(layer)
        return _alpha_of(self, layer) / (r**0.5 if self.rs_scaling else r)


class LoRA(_LoRALike):
    """h = W x + (alpha / r) B A x        Hu et al. 2021, section 4.1"""

    type: Literal["lora"] = "lora"
    """Low-rank updates beside the frozen weights."""

    init: Literal["gaussian", "kaiming", "loftq", "olora", "pissa"] = "kaiming"
    """How A and B start: A random and B zero; the largest singular parts of the weight (pissa) or its QR (olora),
    taken off the weight; or what quantizing the base took away (loftq)."""

    iterations: Count = 5
    """How often loftq alternates between quantizing and taking the singular parts."""

    @property
    def takes_parts(self) -> bool:
        return self.init in ("loftq", "olora", "pissa")


class DoRA(_LoRALike):
    """h = m (W + s B A) x / |W + s B A|        Liu et al. 2024, eq. 5"""

    type: Literal["dora"] = "dora"
    """Low-rank updates of the weights' directions, and their magnitudes."""

    init: Literal["gaussian", "kaiming"] = "kaiming"
    """How A starts: uniform after He et al., or normal with deviation 1 / r. B starts at zero in both."""

    lr_ratio_magnitude: Positive = 1.0
    """How many times A's learning rate the magnitudes learn with."""


class LoHa(LowRank):
    """h = W x + (alpha / r) ((A1 B1) * (A2 B2)) x        Hyeon-Woo et al. 2021 (FedPara), proposition 1"""

    type: Literal["loha"] = "loha"
    """Products of two low-rank updates, element by element: rank up to r squared."""

    r: Count = 8
    """The rank of either factor."""

    alpha: Positive = Field(default_factory=lambda fields: float(fields.get("r", 0)))
    """The update's strength; r by default."""

    def scale_of(self, layer: str) -> float:
        """alpha / r of a layer."""
        return _alpha_of(self, layer) / self.rank_of(layer)

    rate_ratio: ClassVar[float] = 5.0


class LoKr(LowRank):
    """h = W x + (alpha / r) (C kron D) x        Yeh et al. 2023 (LyCORIS), section 3.2; Edalati et al. 2022"""

    type: Literal["lokr"] = "lokr"
    """Kronecker products of a small matrix and a low-rank one."""

    alpha: Positive = Field(default_factory=lambda fields: float(fields.get("r", 0)))
    """The update's strength; r by default."""

    decompose_factor: Annotated[int, AfterValidator(_factor)] = -1
    """The size of the small matrix; -1 makes both factors as equal as the layer's sizes allow."""

    decompose_both: bool = False
    """Makes the small matrix a low-rank product too."""

    def scale_of(self, layer: str) -> float:
        """alpha / r of a layer."""
        return _alpha_of(self, layer) / self.rank_of(layer)

    rate_ratio: ClassVar[float] = 5.0


class VeRA(OnLinear):
    """h = W x + b * B (d * A x)        Kopiczko et al. 2023, eq. 2"""

    type: Literal["vera"] = "vera"
    """One frozen random pair for all layers; only two vectors a layer are trained."""

    r: Count = 256
    """The rank of the shared pair."""

    d_initial: Positive = 0.1
    """Where the vector d starts; b starts at zero."""

    dropout: Dropout = 0.0
    """The share of the adapter's inputs that is dropped while training."""

    projection_seed: Annotated[int, Ge(0)] = 0
    """The seed of the shared pair, by which it is made anew instead of being stored."""

    save_projection: bool = False
    """Keeps the shared pair in the adapter's file all the same; PEFT's own files have it."""

    rate_ratio: ClassVar[float] = 25.0


class AdaLoRA(OnLinear):
    """h = W x + (alpha / r) B diag(e) A x, the ranks pruned to a budget        Zhang et al. 2023, eq. 3"""

    type: Literal["adalora"] = "adalora"
    """Low-rank updates whose ranks go where they matter."""

    target_r: Count = 8
    """The average rank of a layer at the end."""

    init_r: Count = Field(default_factory=lambda fields: (3 * fields.get("target_r", 0) + 1) // 2)
    """The rank that every layer starts with; by default one and a half times target_r."""

    alpha: Positive = Field(default_factory=lambda fields: 2.0 * fields.get("init_r", 0))
    """The update's strength; 2 init_r by default."""

    dropout: Dropout = 0.0
    """The share of the adapter's inputs that is dropped while training."""

    warmup_ratio: Annotated[float, Ge(0), Lt(1)] = 0.1
    """The share of the steps, at the start, in which all ranks stay."""

    final_ratio: Annotated[float, Ge(0), Lt(1)] = 0.3
    """The share of the steps, at the end, in which the ranks stay as they have become."""

    prune_every: Count = 5
    """Steps from one choice of ranks to the next."""

    beta1: Annotated[float, Gt(0), Lt(1)] = 0.85
    """How much of the mean importance is kept a step."""

    beta2: Annotated[float, Gt(0), Lt(1)] = 0.85
    """How much of the importance's mean uncertainty is kept a step."""

    orth_reg_weight: Annotated[float, Ge(0)] = 0.5
    """The weight of |B'B - 1| + |A A' - 1| in the loss, which keeps the factors those of a singular value
    decomposition."""

    rate_ratio: ClassVar[float] = 10.0

    @model_validator(mode="after")
    def _leave_steps_between(self) -> Self:
        found = []
        if self.target_r > self.init_r:
            found.append(Problem(("target_r",), f"{self.target_r} is above init_r, {self.init_r}; ranks only shrink"))
        if self.warmup_ratio + self.final_ratio >= 1:
            found.append(Problem(("final_ratio",), "with warmup_ratio it leaves no step to choose ranks in"))
        if found:
            raise Problems(found)
        return self


class DyLoRA(OnLinear):
    """h = W x + (alpha / sqrt(r b)) B[:, :b] A[:b] x, b drawn each step        Valipour et al. 2023, eq. 5"""

    type: Literal["dylora"] = "dylora"
    """One update that serves at every rank from min_r to r."""

    r: Count = 16
    """The highest rank."""

    min_r: Count = 1
    """The lowest rank that is trained."""

    alpha: Positive = Field(default_factory=_customary_alpha)
    """The update's strength; 2 r by default."""

    dropout: Dropout = 0.0
    """The share of the adapter's inputs that is dropped while training."""

    def scale_at(self, rank: int) -> float:
        """alpha / sqrt(r b) at rank b."""
        return self.alpha / math.sqrt(self.r * rank)

    @model_validator(mode="after")
    def _order_ranks(self) -> Self:
        if self.min_r > self.r:
            raise Problems([Problem(("min_r",), f"{self.min_r} is above r, {self.r}; lower it")])
        return self
