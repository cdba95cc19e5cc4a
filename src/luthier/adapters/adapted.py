"""A module of the model with adapters on it.

An adapter is called with the module's inputs and with `base`, a callable that is the module, or the module under the
adapters further in. Nothing here knows what kind of adapter it calls.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Adapted", "AdaptedLinear", "Base", "bare", "put_back"]

Base = Callable[..., Any]


class Adapted(nn.Module):
    """A module with any number of named adapters, of which those in `active` apply, one around the other.

    The base keeps its own name and parameters, so that taking the adapters away is putting `base` back. For all else
    than calling it, it looks like the base.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base: Any = base
        self.adapters: Any = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.shares: dict[str, float] = {}  # of an adapter's effect, where that is not the whole
        self.rows: tuple[tuple[str | None, Tensor], ...] = ()  # which adapter serves which rows of a batch, if several

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    @property
    def weight(self) -> Tensor:
        """The weight that the active adapters leave: for code that reads it, as the output layer's is."""
        weight: Tensor = self.base.weight
        for name in self.active:
            weight = self.adapters[name].parameter("weight", weight)
        return weight

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with the active adapters merged in; the base stays as it is."""
        weight: Any = getattr(self.base, "weight", None)  # none of its own where the module is a block or a body
        bias: Tensor | None = getattr(self.base, "bias", None)
        for name in self.active:
            new_weight, new_bias = self.adapters[name].merge(weight, bias)
            share = self.shares.get(name, 1.0)
            weight, bias = _toward(weight, new_weight, share), _toward(bias, new_bias, share)
        return weight, bias

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """As the base."""
        return self._apply_all(self.active)(*inputs, **options)

    def _apply_all(self, names: Sequence[str]) -> Base:
        apply: Base = self.base
        for name in names:
            apply = partial(self.adapters[name], base=apply)
        return apply


class AdaptedLinear(Adapted):
    """A linear layer with adapters: these see one row a token, may be mixed by shares, and each serve rows of their
    own.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]."""
        if self.rows:
            return self._by_rows(x)
        if not self.active:
            plain: Tensor = self.base(x)
            return plain
        flat: Tensor = self._apply_all(self.active)(x.reshape(-1, x.shape[-1]))
        return flat.view(*x.shape[:-1], -1)

    def _apply_all(self, names: Sequence[str]) -> Base:
        apply: Base = self.base
        for name in names:
            apply = partial(self.adapters[name], base=apply)
            if (share := self.shares.get(name, 1.0)) != 1:
                apply = partial(_shared, inner=apply.keywords["base"], outer=apply, share=share)
        return apply

    def _by_rows(self, x: Tensor) -> Tensor:
        """x: [rows, ..., in], or [1, tokens, in] where a stream's tokens are what is assigned; what a stream is made up
        with has no adapter.
        """
        dim = 1 if x.shape[0] == 1 else 0
        num_assigned = sum(len(rows) for _, rows in self.rows)
        parts, places = [], []
        for name, rows in (*self.rows, (None, torch.arange(num_assigned, x.shape[dim], device=x.device))):
            given = x.index_select(dim, rows)
            apply = self._apply_all([name] if name is not None and name in self.adapters else [])
            output: Tensor = apply(given.reshape(-1, x.shape[-1]))
            parts.append(output.view(*given.shape[:-1], output.shape[-1]))
            places.append(rows)
        return torch.cat(parts, dim).index_select(dim, torch.cat(places).argsort())


def _shared(x: Tensor, *, inner: Base, outer: Base, share: float) -> Tensor:
    """inner(x) + share * (outer(x) - inner(x))"""
    before: Tensor = inner(x)
    return before.lerp(outer(x), share)


def _toward(old: Tensor | None, new: Tensor | None, share: float) -> Any:
    if share == 1 or new is None:
        return new
    wide = torch.promote_types(new.dtype, torch.float32)
    start = torch.zeros_like(new) if old is None else old
    return start.to(wide).lerp(new.to(wide), share).to(new.dtype)


def bare(module: nn.Module) -> nn.Module:
    """The module without the adapters that it carries."""
    return module.base if isinstance(module, Adapted) else module


def put_back(network: nn.Module, layers: Collection[Adapted]) -> None:
    """Exchanges these for their bases; adapters that are still on them are gone."""
    inner_first = reversed(list(network.named_modules()))
    for path, module in inner_first:
        if isinstance(module, Adapted) and module in layers:
            network.set_submodule(path, module.base)
