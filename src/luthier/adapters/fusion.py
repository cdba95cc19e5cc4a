"""Several low-rank updates of the same model made into one, as pure functions of tensors.

A layer's updates change its weight W [out, in] by Delta W_i = s_i B_i A_i. Two methods work on their sum:
`concatenate` is exact and grows the rank, `svd` is the best update of a smaller rank. The others average the factors A
and B one by one, which keeps the rank but mixes every B_i with every A_j; their numbers are those of PEFT's
`add_weighted_adapter`. An adapter's weight counts as a factor of its scale throughout.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.errors import AdapterError
from luthier.recipe.problems import unknown

__all__ = ["FUSIONS", "Layer", "Update", "concatenate", "dare_linear", "dare_ties", "fuse", "linear", "svd", "ties"]


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """One layer's low-rank update, Delta W = scale * b @ a. a: [r, in]. b: [out, r]."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """The updates of one layer, weights within their scales and factors widened, and the settings of the methods.

    r: the rank that `svd` leaves, None for the largest one given. density: the share of entries that `ties` and `dare`
    keep. seed: of the layer's own draws.
    """

    name: str
    updates: Sequence[Update]
    r: int | None
    density: float
    seed: int


def concatenate(layer: Layer) -> Update:
    """Delta W = sum_i s_i B_i A_i, exactly: the A_i one below the other, the B_i side by side; rank sum_i r_i."""
    a = torch.cat([update.scale * update.a for update in layer.updates])
    return Update(a, torch.cat([update.b for update in layer.updates], dim=1), 1.0)


def svd(layer: Layer) -> Update:
    """The update of rank r nearest to sum_i s_i B_i A_i in the Frobenius norm        Eckart and Young 1936

    With B = Q_b R_b and A^T = Q_a R_a of the concatenated factors, B A = Q_b (R_b R_a^T) Q_a^T: the singular values
    are those of a core of at most [sum r_i, sum r_i], and no [out, in] matrix is built. Each factor takes their root.
    Where the sum of ranks or the layer is smaller than r, so is the result's rank.
    """
    whole = concatenate(layer)
    q_b, r_b = torch.linalg.qr(whole.b)
    q_a, r_a = torch.linalg.qr(whole.a.T)
    u, singular, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    r = layer.r or max(len(update.a) for update in layer.updates)
    root = singular[:r].sqrt()
    return Update(root[:, None] * (v[:r] @ q_a.T), q_b @ u[:, :r] * root, 1.0)


def linear(layer: Layer) -> Update:
    """A = sum_i sign(s_i) sqrt|s_i| A_i,  B = sum_i sqrt|s_i| B_i

    The cheapest and roughest: B A holds the products B_i A_j of different adapters too.
    """
    return _each_factor(layer, _everything, _sum)


def ties(layer: Layer) -> Update:
    """`linear` with each factor trimmed, and per entry only those of the elected sign        Yadav et al. 2023, alg. 1

    Of every A_i and B_i the share `density` of largest magnitude stays, rounded down to whole entries. Per entry, the
    sign of the trimmed factors' sum wins, their weights and scales not counted (as in PEFT); those that bear it are
    weighted as in `linear`, summed, and divided by their number.
    """
    return _each_factor(layer, lambda factor: _largest(factor, layer.density), _elected_mean)


def dare_linear(layer: Layer) -> Update:
    """`linear` over m * A_i / density and m * B_i / density, m ~ Bernoulli(density)        Yu et al. 2024

    A random share 1 - density of each factor's entries is dropped and the rest scaled up: the expected value stays.
    """
    return _each_factor(layer, _dropping(layer), _sum)


def dare_ties(layer: Layer) -> Update:
    """`ties` whose trimming drops at random and scales up, as `dare_linear` does        Yu et al. 2024"""
    return _each_factor(layer, _dropping(layer), _elected_mean)


FUSIONS: dict[str, Callable[[Layer], Update]] = {
    "concatenate": concatenate,
    "svd": svd,
    "linear": linear,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
}


@torch.no_grad()
def fuse(
    updates: Sequence[Mapping[str, Update]],
    weights: Sequence[float] | None,
    *,
    method: str,
    r: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> dict[str, Update]:
    """One update per layer that any adapter changes, all of scale 1, by the method of `FUSIONS` that is named.

    updates: for each adapter, its updates by layer name; a layer that an adapter leaves alone counts as zero there.
    weights: one a adapter, negative ones subtract; None is the average. r: for `svd` alone. Results are in float32, or
    in float64 if any of a layer's factors is. Raises AdapterError for settings out of their range, and for updates of
    different models, of different ranks where a method needs equal ones, or that are not finite.
    """
    if method not in FUSIONS:
        raise AdapterError(f"{method}: {unknown('fusion method', method, list(FUSIONS))}")
    if r is not None and method != "svd":
        raise AdapterError(f"r: only svd chooses its rank, and the method is {method}; leave r out")
    if r is not None and r < 1:
        raise AdapterError(f"r: expected at least 1, got {r}")
    if not 0 < density <= 1:
        raise AdapterError(f"density: expected more than 0 and at most 1, got {density}")
    shares = _weights(updates, weights)
    fused = {}
    for name in dict.fromkeys(name for adapter in updates for name in adapter):
        present = [(adapter[name], share) for adapter, share in zip(updates, shares, strict=True) if name in adapter]
        fused[name] = FUSIONS[method](Layer(name, _weighted(name, present), r, density, _layer_seed(seed, name)))
    return fused


def _weights(updates: Sequence[Mapping[str, Update]], weights: Sequence[float] | None) -> Sequence[float]:
    if not any(updates):
        raise AdapterError(f"fusion of {len(updates)} adapters: they change no layer; give at least one that does")
    if weights is None:
        return [1 / len(updates)] * len(updates)
    if len(weights) != len(updates):
        raise AdapterError(f"weights: {len(weights)} given for {len(updates)} adapters; give one for each")
    for place, weight in enumerate(weights):
        if not math.isfinite(weight):
            raise AdapterError(f"weights[{place}]: expected a finite number, got {weight}")
    return weights


def _weighted(name: str, present: Sequence[tuple[Update, float]]) -> list[Update]:
    """The layer's updates with their weights multiplied into the scales, all factors of one type."""
    shapes = [(list(update.b.shape), list(update.a.shape)) for update, _ in present]
    for b, a in shapes:
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise AdapterError(f"{name}: factors b {b} and a {a} do not fit; b must be [out, r] and a [r, in]")
    layers = {(b[0], a[1]) for b, a in shapes}
    if len(layers) > 1:
        sizes = " and ".join(f"[{size_out}, {size_in}]" for size_out, size_in in sorted(layers))
        raise AdapterError(
            f"{name}: the adapters are of different models, with weights {sizes}; fuse those of one model"
        )
    dtype = torch.float32
    for factor in (factor for update, _ in present for factor in (update.a, update.b)):
        dtype = torch.promote_types(dtype, factor.dtype)
        if not bool(factor.isfinite().all()):
            raise AdapterError(f"{name}: an update holds values that are not finite; leave the broken adapter out")
    return [Update(update.a.to(dtype), update.b.to(dtype), update.scale * share) for update, share in present]


def _layer_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8])


def _each_factor(layer: Layer, trim: Callable[[Tensor], Tensor], combine: Callable[[Tensor, Tensor], Tensor]) -> Update:
    """The A_i and the B_i each trimmed and combined with weights sqrt|s_i|, the sign of s_i on A alone."""
    ranks = [len(update.a) for update in layer.updates]
    if len(set(ranks)) > 1:
        raise AdapterError(
            f"{layer.name}: the adapters' ranks differ ({', '.join(map(str, ranks))}); use concatenate or svd"
        )
    a = torch.stack([trim(update.a) for update in layer.updates])
    b = torch.stack([trim(update.b) for update in layer.updates])
    roots = a.new_tensor([math.sqrt(abs(update.scale)) for update in layer.updates])[:, None, None]
    signs = a.new_tensor([math.copysign(1, update.scale) for update in layer.updates])[:, None, None]
    return Update(combine(a, signs * roots), combine(b, roots), 1.0)


def _everything(factor: Tensor) -> Tensor:
    return factor


def _largest(factor: Tensor, density: float) -> Tensor:
    """The factor with all but the share `density` of largest magnitude set to zero."""
    kept = factor.abs().flatten().topk(int(density * factor.numel())).indices
    return torch.zeros_like(factor).flatten().index_copy(0, kept, factor.flatten()[kept]).view_as(factor)


def _dropping(layer: Layer) -> Callable[[Tensor], Tensor]:
    """m * factor / density with a new m at each call, drawn on the CPU: the same on every device."""
    generator = torch.Generator().manual_seed(layer.seed)

    def drop(factor: Tensor) -> Tensor:
        kept = torch.rand(factor.shape, generator=generator) < layer.density
        return factor * kept.to(factor.device) / layer.density

    return drop


def _sum(factors: Tensor, weights: Tensor) -> Tensor:
    """factors: [adapters, rows, columns]. weights: [adapters, 1, 1]."""
    return (weights * factors).sum(0)


def _elected_mean(factors: Tensor, weights: Tensor) -> Tensor:
    """Per entry, the weighted mean of the factors that bear the sign of all factors' sum (a sum of 0 counts as +)."""
    elected = torch.where(factors.sum(0) >= 0, 1.0, -1.0)
    agrees = factors.sign() == elected
    return (weights * factors * agrees).sum(0) / agrees.sum(0).clamp(min=1)
