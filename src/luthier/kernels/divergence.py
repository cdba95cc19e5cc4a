"""How far two models' next-token distributions are apart, without ever holding all logits."""

import torch
from torch import Tensor

from luthier.kernels.logprobs import HeadOptions, logits_of
from luthier.kernels.turns import slices

__all__ = ["linear_divergence"]


@torch.no_grad()
def linear_divergence(
    hidden: Tensor,
    other: Tensor,
    weights: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    options: HeadOptions,
) -> Tensor:
    """KL(p || q) = sum p (log p - log q) in nats, [rows], of p = softmax(h W^T + b) and q of the other hidden states.

    hidden, other: [rows, size]. weights, biases: the output layers of p and of q. No gradient.
    """
    found = torch.empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    at_once = max(1, options.chunk_bytes // (4 * len(weights[0])))
    for rows in slices(len(hidden), at_once):
        log_p = _log_probabilities(hidden[rows], weights[0], biases[0], options)
        log_q = _log_probabilities(other[rows], weights[1], biases[1], options)
        found[rows] = (log_p.exp() * (log_p - log_q)).sum(-1)
    return found


def _log_probabilities(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: HeadOptions) -> Tensor:
    return torch.log_softmax(logits_of(torch.nn.functional.linear(hidden, weight, bias), options), dim=-1)
