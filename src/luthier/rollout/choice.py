"""Which token comes next: a draw from logits, one uniform number a row, and its log-probability.

A row's draw is the place of its number in the cumulative probabilities, so it depends on that row alone. The
log-probability is that of the distribution before anything is cut from it, which is what training scores.
"""

import torch
from torch import Tensor

from luthier.rollout.requests import Sampling

__all__ = ["choose", "penalized"]

FEW = 512  # candidates that are looked at first; mostly they hold all of top_p


def choose(logits: Tensor, uniforms: Tensor, sampling: Sampling, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Tokens [rows] int64 and their log-probabilities [rows], in nats, at the temperature (at 1 where that is 0); nan
    where a row's logits are not numbers.

    logits: [rows, vocabulary] float32; used up. uniforms: [rows], in [0, 1). seen: [rows, vocabulary] bool, the tokens
    that the repetition penalty makes less likely.
    """
    if sampling.temperature not in (0, 1):
        logits = logits.div_(sampling.temperature)
    normalizer = logits.logsumexp(-1, keepdim=True)
    tokens = _chosen(logits, normalizer, uniforms, sampling, seen)[:, None]
    return tokens.squeeze(-1), (logits.gather(-1, tokens) - normalizer).squeeze(-1)


def _chosen(logits: Tensor, normalizer: Tensor, uniforms: Tensor, sampling: Sampling, seen: Tensor | None) -> Tensor:
    """The tokens. The logits stay as they are."""
    if seen is not None:
        logits = penalized(logits, seen, sampling.repetition_penalty)  # at any temperature: it scales as that does
        normalizer = logits.logsumexp(-1, keepdim=True)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    if sampling.top_k or sampling.top_p < 1 or sampling.min_p > 0:
        return _among_likely(logits, normalizer, uniforms, sampling)
    return _drawn(logits.sub(normalizer).exp_(), uniforms)


def penalized(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits of the tokens that were there already, made smaller        Keskar et al. 2019, section 4.1

    seen: [rows, vocabulary] bool.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _drawn(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first place where the cumulative weights exceed the number's share of them all; never one of weight 0."""
    cumulative = weights.cumsum(-1)
    wanted = uniforms[:, None].to(cumulative.dtype) * cumulative[:, -1:]
    wanted = torch.minimum(wanted, cumulative[:, -1:].nextafter(cumulative.new_zeros(())))  # rounding may reach the end
    places = torch.searchsorted(cumulative, wanted, right=True).squeeze(-1)
    return places.clamp_(max=weights.shape[-1] - 1)  # weights that are not numbers have no place


def _among_likely(logits: Tensor, normalizer: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """A draw from the tokens that top_k, then top_p, then min_p leave, each of what the one before left."""
    number = sampling.top_k or (FEW if sampling.top_p < 1 else logits.shape[-1])
    values, tokens = logits.topk(min(number, logits.shape[-1]))
    weights = values.sub_(normalizer).exp_()
    if not sampling.top_k and sampling.top_p < 1 and bool((weights.sum(-1) < sampling.top_p).any()):
        values, tokens = logits.sort(-1, descending=True)
        weights = values.sub_(normalizer).exp_()
    if sampling.top_p < 1:
        whole = weights.sum(-1, keepdim=True) if sampling.top_k else 1.0
        before = weights.cumsum(-1) - weights
        weights = weights.masked_fill(before >= sampling.top_p * whole, 0)
    if sampling.min_p > 0:
        weights = weights.masked_fill(weights < sampling.min_p * weights[:, :1], 0)
    return tokens.gather(-1, _drawn(weights, uniforms)[:, None]).squeeze(-1)
