"""VeRA: one frozen random pair for all layers, and two learned vectors for each.

The pair follows from a seed and from the sizes of the largest layers, so an adapter's file can do without it. It is no
parameter or buffer of any layer: moving a network would make a copy for each. It follows the activations instead.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from luthier.adapters.base import Additive, PeftForm, Start
from luthier.adapters.lora import plus_product
from luthier.errors import AdapterError
from luthier.kernels.scaled_low_rank import add_scaled_low_rank

__all__ = ["Projections", "VeRA"]

_KEYS = ("base_model.vera_A", "base_model.vera_B")  # in PEFT's file


class Projections:
    """The shared pair, in float32: A [r, largest in] and B [largest out, r]. A layer takes the corner that it needs."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.pair = (a, b)

    def corner(self, num_in: int, num_out: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] on this device, where the whole pair then stays, to be trained with too."""
        if self.pair[0].device != device:
            with torch.inference_mode(False):
                self.pair = (self.pair[0].to(device), self.pair[1].to(device))
        return self.pair[0][:, :num_in], self.pair[1][:num_out]


class VeRA(Additive):
    """h = W x + b * B (d * A x)        Kopiczko et al. 2023, eq. 2"""

    peft = PeftForm(
        "VERA",
        {
            **{name: name for name in ("r", "target_modules", "layers_to_transform", "modules_to_save", "d_initial")},
            **{"dropout": "vera_dropout", "projection_seed": "projection_prng_key"},
            **{"save_projection": "save_projection"},
        },
        {"bias": "none", "fan_in_fan_out": False},
    )
    optional_keys = frozenset(_KEYS)
    projections: Projections | None = None

    def create(self) -> None:
        self.vera_lambda_d = Parameter(torch.zeros(self.settings.r, device=self.device))
        self.vera_lambda_b = Parameter(torch.zeros(self.out_features, device=self.device))

    @classmethod
    def share(cls, adapters: Sequence[Any], network: nn.Module, stored: Mapping[str, Tensor]) -> None:
        """The pair of the file, or the one that the seed makes. Raises AdapterError for a pair of other sizes, or where
        the settings say that the file holds one and it does not.
        """
        settings = adapters[0].settings
        places: Any = cls.places(network, settings).values()
        shape_a = (settings.r, max(place.in_features for place in places))
        shape_b = (max(place.out_features for place in places), settings.r)
        if set(_KEYS) <= stored.keys():
            a, b = (stored[key].float() for key in _KEYS)
            if (a.shape, b.shape) != (shape_a, shape_b):
                raise AdapterError(
                    f"made for another model: {_KEYS[0]} is {tuple(a.shape)}, here {shape_a}; {_KEYS[1]} is "
                    f"{tuple(b.shape)}, here {shape_b}"
                )
        elif stored and settings.save_projection:
            raise AdapterError(f"save_projection: the file holds no {_KEYS[0]}; save the adapter again")
        else:
            a, b = _drawn(settings.projection_seed, shape_a, shape_b)
        shared = Projections(a, b)
        for adapter in adapters:
            adapter.projections = shared

    def initialize(self, start: Start) -> None:
        """d at its setting, b at zero."""
        nn.init.constant_(self.vera_lambda_d, self.settings.d_initial)
        nn.init.zeros_(self.vera_lambda_b)

    def _corner(self, device: torch.device) -> tuple[Tensor, Tensor]:
        assert self.projections is not None
        return self.projections.corner(self.in_features, self.out_features, device)

    def add(self, x: Tensor, output: Tensor | None) -> Tensor:
        dropped = torch.nn.functional.dropout(x, self.settings.dropout, self.training)
        a, b = self._corner(x.device)
        return add_scaled_low_rank(output, dropped, (a, b, self.vera_lambda_d, self.vera_lambda_b))

    @torch.no_grad()
    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        a, b = self._corner(self.vera_lambda_d.device)
        return plus_product(weight, a * self.vera_lambda_d[:, None], b * self.vera_lambda_b[:, None], 1.0), bias

    def saved(self) -> dict[str, Tensor]:
        """With the pair, once for all layers, where the settings ask for it."""
        pair = self.projections.pair if self.settings.save_projection and self.projections is not None else ()
        return super().saved() | dict(zip(_KEYS, pair, strict=False))


def _drawn(seed: int, *shapes: tuple[int, int]) -> list[Tensor]:
    """As PEFT draws them, one after the other: uniform with variance 2 / columns (He et al. 2015, eq. 10)."""
    generator = torch.Generator().manual_seed(seed)
    bounds = [math.sqrt(3) * (math.sqrt(2) / math.sqrt(columns)) for _, columns in shapes]
    return [torch.empty(s).uniform_(-n, n, generator=generator) for s, n in zip(shapes, bounds, strict=True)]
