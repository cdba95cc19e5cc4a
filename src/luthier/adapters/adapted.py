"""A module of the model with adapters on it.

An adapter is called with the module's inputs and with `base`, a callable that is the module, or the module under the
adapters further in. Nothing here knows what kind of adapter it calls.

On a linear layer, base(x, onto=y) is base(x) + y, perhaps written into y. It is what adapters of outputs in few bits
use: the layer's product is then rounded once, with all that they add in it.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from luthier.errors import AdapterError
from luthier.kernels.linear import linear_onto
from luthier.kernels.streams import STREAM_MULTIPLE

__all__ = ["Adapted", "AdaptedLinear", "Base", "Layer", "Rows", "bare", "is_innermost", "put_back", "refuse_stripped"]

Base = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer as the base of its innermost adapter."""

    module: nn.Module

    def __call__(self, x: Tensor, *, onto: Tensor | None = None) -> Tensor:
        """x: [tokens, in] -> [tokens, out]. onto: [tokens, out] in the same type."""
        module: Any = self.module
        result: Tensor
        if onto is None:
            result = module(x)
        elif _is_watched(module):  # who watches is to see what the layer gives: rounded twice
            result = onto.add_(module(x))
        elif getattr(module, "takes_onto", False):
            result = module(x, onto=onto)
        elif type(module).forward is nn.Linear.forward:
            result = linear_onto(onto, x, module.weight, module.bias)
        else:  # a stranger's
            result = onto.add_(module(x))
        return result


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody has put hooks on the module, or another formula in place of its own."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


@dataclass(frozen=True, slots=True)
class Rows:
    """Which adapter serves which rows of a batch, or which tokens of a stream in which the rows lie end to end.

    places: by adapter, or None for the base, the numbers of its rows or tokens. count: of all of them.
    """

    places: Mapping[str | None, Tensor]
    count: int
    in_stream: bool

    def cut(self, x: Tensor) -> Tensor:
        """x: [rows, ..., in] or [rows * tokens, in]; of a stream [1, tokens, in] or [tokens, in], made up at its end.

        Gives [rows, tokens, in], or [tokens, 1, in]. Raises AdapterError for another number of rows or tokens.
        """
        *outer, tokens, size = x.shape
        if self.in_stream:
            fits = all(n == 1 for n in outer) and 0 <= tokens - self.count < STREAM_MULTIPLE
        else:
            fits = outer[0] == self.count if outer else tokens % self.count == 0
        if not fits:
            raise AdapterError(
                f"assign_rows: {self.count} {'tokens in one stream' if self.in_stream else 'rows'} have adapters, and "
                f"a layer is called with {list(x.shape)}; name an adapter, or None, for each row of the batch"
            )
        return x.reshape(-1, 1, size) if self.in_stream else x.reshape(self.count, -1, size)


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
        self.rows: Rows | None = None  # which adapter serves which rows of a batch, if each has its own

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    @property
    def is_merged(self) -> bool:
        """Whether the base is, for a while, another than the adapters were put on, into which they are merged."""
        return any(adapter.place is not self.base for adapter in self.adapters.values())

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
        for adapter in self._not_among(self._shares):
            weight = adapter.restore(weight)
        for name, share in self._shares.items():
            adapter = self.adapters[name]
            new_weight, new_bias = adapter.merge(weight, bias)
            without = adapter.restore(weight) if share != 1 else weight
            weight, bias = _toward(without, new_weight, share), _toward(bias, new_bias, share)
        return weight, bias

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """As the base."""
        return self._apply_all(self._shares)(*inputs, **options)

    @property
    def _shares(self) -> dict[str, float]:
        return {name: self.shares.get(name, 1.0) for name in self.active}

    @property
    def _innermost(self) -> Base:
        base: Base = self.base
        return base

    def _apply_all(self, shares: Mapping[str, float]) -> Base:
        apply = self._innermost
        for adapter in self._not_among(shares):
            apply = partial(adapter.base_alone, base=apply)
        for name, share in shares.items():
            inner, apply = apply, partial(self.adapters[name], base=apply)
            if share != 1:
                without = partial(self.adapters[name].base_alone, base=inner)
                apply = partial(_shared, inner=without, outer=apply, share=share)
        return apply

    def _not_among(self, names: Collection[str]) -> list[Any]:
        """The adapters that do not apply and have a part of the base's weight."""
        idle = [adapter for name, adapter in self.adapters.items() if adapter.stripped and name not in names]
        return idle if idle and not self.is_merged else []


class AdaptedLinear(Adapted):
    """A linear layer with adapters: these see one row a token, may be mixed by shares, and each serve rows of their
    own.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]."""
        if self.rows is not None:
            return self._by_rows(x, self.rows)
        apply = self._apply_all(self._shares)
        if isinstance(apply, Layer):
            return apply(x)
        flat: Tensor = apply(x.reshape(-1, x.shape[-1]))
        return flat.view(*x.shape[:-1], flat.shape[-1])

    @property
    def _innermost(self) -> Base:
        return Layer(self.base)

    def _by_rows(self, x: Tensor, rows: Rows) -> Tensor:
        """Each row's adapter applies wholly; what a stream is made up with has none."""
        cut = rows.cut(x)
        behind = torch.arange(rows.count, len(cut), device=x.device)
        parts, places = [], []
        for name, numbers in (*rows.places.items(), *([(None, behind)] if len(behind) else [])):
            apply = self._apply_all({name: 1.0} if name is not None and name in self.adapters else {})
            output: Tensor = apply(cut.index_select(0, numbers).flatten(0, 1))
            parts.append(output.unflatten(0, (len(numbers), cut.shape[1])))
            places.append(numbers)
        joined = torch.cat(parts).index_select(0, torch.cat(places).argsort())
        return joined.view(*x.shape[:-1], joined.shape[-1])


def _shared(x: Tensor, *, onto: Tensor | None = None, inner: Base, outer: Base, share: float) -> Tensor:
    """inner(x) + share * (outer(x) - inner(x))"""
    before: Tensor = inner(x)
    mixed = before.lerp(outer(x), share)
    return mixed if onto is None else onto.add_(mixed)


def _toward(old: Tensor | None, new: Tensor | None, share: float) -> Any:
    if share == 1 or new is None:
        return new
    wide = torch.promote_types(new.dtype, torch.float32)
    start = torch.zeros_like(new) if old is None else old
    return start.to(wide).lerp(new.to(wide), share).to(new.dtype)


def bare(module: nn.Module) -> nn.Module:
    """The module without the adapters that it carries."""
    return module.base if isinstance(module, Adapted) else module


def is_innermost(base: Base, module: nn.Module) -> bool:
    """Whether this base is the module itself, with no other adapter on it."""
    return (base.module if isinstance(base, Layer) else base) is module


def put_back(network: nn.Module, layers: Collection[Adapted]) -> None:
    """Exchanges these for their bases; adapters that are still on them are gone. Raises AdapterError as
    `refuse_stripped` does, with the network as it was.
    """
    refuse_stripped(adapter for layer in layers if not layer.is_merged for adapter in layer.adapters.values())
    inner_first = reversed(list(network.named_modules()))
    for path, module in inner_first:
        if isinstance(module, Adapted) and module in layers:
            network.set_submodule(path, module.base)


def refuse_stripped(adapters: Iterable[Any]) -> None:
    """Raises AdapterError where one of these has a part of the weight that the base was stored without."""
    for adapter in adapters:
        if adapter.stripped:
            raise AdapterError(
                f"{adapter.name}: the base was quantized without what this adapter started from, so it cannot do "
                "without the adapter; switch it off, or load the model anew"
            )
