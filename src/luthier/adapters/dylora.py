"""DyLoRA: one low-rank update that serves at every rank from min_r to r.

Its file is that of a LoRA of rank r, which anybody can load; the rank to serve at is chosen when it is loaded or later.
"""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from luthier.adapters.adapted import Adapted
from luthier.adapters.base import Adapter, Additive, PeftForm, Start, Step
from luthier.adapters.lora import checked_rank, plus_product
from luthier.adapters.starts import Factors, kaiming_uniform
from luthier.adapters.targets import named_places
from luthier.errors import AdapterError
from luthier.kernels.low_rank import add_low_rank
from luthier.recipe.adapters import AnyAdapter
from luthier.recipe.adapters import DyLoRA as Settings

__all__ = ["DyLoRA", "rank_to_serve", "serve_at", "served_rank", "set_rank"]


_SHARE_OF_WHOLE = 0.25  # of the steps, in which the highest rank is drawn besides its even chance


class DyLoRA(Additive):
    """h = W x + (alpha / sqrt(r b)) B[:, :b] A[:b] x        Valipour et al. 2023, eq. 5

    The paper's scale is alpha / b. That of rank stabilisation (Kalajdzievski 2023) is as strong at b = r, and with it a
    higher rank is the better one: with alpha / b a low one learned so strongly that the highest fell behind.

    While training, b is drawn once a step for all layers, and depends on the seed and the step alone: in a quarter of
    the steps it is r, else even from min_r to r. Drawn evenly alone, as in the paper, the last directions learned so
    seldom that r was no better than half of it. Else b is the rank that was chosen, r by default.
    """

    peft = PeftForm(
        "LORA",
        {
            **{name: name for name in ("r", "target_modules", "layers_to_transform", "modules_to_save")},
            **{"alpha": "lora_alpha", "dropout": "lora_dropout"},
        },
        {"bias": "none", "fan_in_fan_out": False, "use_dora": False, "use_rslora": False},
        borrowed=True,
    )
    file_names: ClassVar = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}

    def create(self) -> None:
        self.served = self.drawn = checked_rank(self, self.settings.r)
        self.lora_A = Parameter(torch.zeros(self.served, self.in_features, device=self.device))
        self.lora_B = Parameter(torch.zeros(self.out_features, self.served, device=self.device))

    @torch.no_grad()
    def initialize(self, start: Start) -> None:
        """As LoRA: A uniform in +-1/sqrt(in), B zero."""
        self.lora_A.copy_(kaiming_uniform(tuple(self.lora_A.shape), start.generator))

    @classmethod
    def before_step(cls, adapters: Sequence[Any], step: Step) -> None:
        settings: Settings = adapters[0].settings
        generator = torch.Generator().manual_seed((step.seed * 1_000_003 + step.index) % 2**63)
        drawn = int(torch.randint(settings.min_r, settings.r + 1, (), generator=generator))
        if float(torch.rand((), generator=generator)) < _SHARE_OF_WHOLE:
            drawn = settings.r
        for adapter in adapters:
            adapter.drawn = drawn

    def _first(self, rank: int) -> tuple[Factors, float]:
        """The factors of this rank, and their scale."""
        return (self.lora_A[:rank], self.lora_B[:, :rank]), self.settings.scale_at(rank)

    def add(self, x: Tensor, output: Tensor | None) -> Tensor:
        dropped = torch.nn.functional.dropout(x, self.settings.dropout, self.training)
        (a, b), scale = self._first(self.drawn if self.training else self.served)
        return add_low_rank(output, dropped, a, b, scale)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """At the rank that is served."""
        (a, b), scale = self._first(self.served)
        return plus_product(weight, a, b, scale), bias


def set_rank(network: nn.Module, rank: int, *, name: str = "default") -> None:
    """Serves the adapter of this name at this rank from now on, where it does not train; files keep all ranks.

    Raises AdapterError if there is no such adapter, or it was not trained for this rank.
    """
    places = [place for _, place in named_places(network) if isinstance(place, Adapted) and name in place.adapters]
    adapters: list[Adapter] = [place.adapters[name] for place in places]
    if not adapters:
        raise AdapterError(f'the model carries no adapter named "{name}"')
    serve_at(adapters, rank_to_serve(adapters[0].settings, rank))


def rank_to_serve(settings: AnyAdapter, asked: int | None, remembered: str | None = None) -> int | None:
    """The rank that was asked for, else the one that a file remembers, else None for the usual one.

    Raises AdapterError if an adapter of these settings does not have the rank, or what is remembered is none.
    """
    if isinstance(settings, Settings):
        rank = _number(remembered) if asked is None and remembered is not None else asked
        if rank is not None and not settings.min_r <= rank <= settings.r:
            raise AdapterError(
                f"rank: {rank} is not among those that the adapter was trained for, {settings.min_r} to {settings.r}; "
                "choose one of these"
            )
        return rank
    if asked is not None:
        raise AdapterError(
            f"rank: an adapter of type {settings.type} serves as it is; leave rank out, or train one of type dylora"
        )
    return None


def _number(remembered: str) -> int:
    if not remembered.isdecimal():
        raise AdapterError(f'rank: the file remembers "{remembered}", which is no number; save the adapter again')
    return int(remembered)


def serve_at(adapters: Iterable[Adapter], rank: int | None) -> None:
    """Chooses the rank of those that have several."""
    for adapter in adapters:
        if isinstance(adapter, DyLoRA):
            adapter.served = rank or adapter.settings.r


def served_rank(adapters: Iterable[Adapter]) -> int | None:
    """The rank that was chosen for these, None for the usual one."""
    chosen = (a.served for a in adapters if isinstance(a, DyLoRA) and a.served != a.settings.r)
    return next(chosen, None)
