"""Where adapters start: random matrices as PEFT draws them, and parts of the weight itself.

Everything is float32 or wider and comes from a generator, so that the same seed gives the same start.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Factors", "gaussian", "kaiming_uniform", "loftq", "olora", "pissa", "truncated_svd"]

Factors = tuple[Tensor, Tensor]
"""A [r, in] and B [out, r], whose product B A is meant."""

_OVERSAMPLING, _POWER_ITERATIONS = 16, 6


def kaiming_uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform in +-1/sqrt(in), in being the last size: He et al. 2015 with a = sqrt 5, as torch's linear layers."""
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def gaussian(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    """Normal with mean 0."""
    return torch.empty(shape).normal_(std=std, generator=generator)


def truncated_svd(matrix: Tensor, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, r], S [r], V' [r, in] of the r largest singular values, by subspace iteration (Halko et al. 2011,
    algorithm 4.4); exact where r is not small against the matrix.
    """
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    wide = r + _OVERSAMPLING
    if 4 * wide >= min(matrix.shape):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :r], s[:r], v[:r]
    start = torch.empty(matrix.shape[1], wide).normal_(generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, s, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ u)[:, :r], s[:r], v[:r]


def pissa(weight: Tensor, r: int, scale: float, generator: torch.Generator) -> Factors:
    """scale B A = the r largest singular parts of the weight        Meng et al. 2024 (PiSSA), eq. 2 and 3"""
    return _balanced(truncated_svd(weight, r, generator), scale)


def olora(weight: Tensor, r: int, scale: float, generator: torch.Generator) -> Factors:
    """B, A = the first r columns of Q and rows of R of the weight        Buyukakyuz 2024 (OLoRA), algorithm 1"""
    q, rest = torch.linalg.qr(weight.to(torch.promote_types(weight.dtype, torch.float32)))
    return rest[:r], q[:, :r]


def loftq(
    weight: Tensor,
    r: int,
    scale: float,
    generator: torch.Generator,
    *,
    rounding: Callable[[Tensor], Tensor],
    iterations: int,
) -> tuple[Factors, Factors]:
    """Q_t = q(W - scale B A_{t-1}), scale B A_t = the r largest singular parts of W - Q_t        Li et al. 2023,
    algorithm 1

    Returns the last factors, and those before them, which the weight must be without when it is quantized.
    """
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    before = now = (exact.new_zeros(r, weight.shape[1]), exact.new_zeros(weight.shape[0], r))
    for _ in range(iterations):
        before = now
        rounded = rounding((exact - scale * (before[1] @ before[0])).to(weight.dtype))
        now = _balanced(truncated_svd(exact - rounded.to(exact.dtype), r, generator), scale)
    return now, before


def _balanced(parts: tuple[Tensor, Tensor, Tensor], scale: float) -> Factors:
    """The singular values' roots in either factor."""
    u, s, v = parts
    root = (s / scale).sqrt()
    return root[:, None] * v, u * root
