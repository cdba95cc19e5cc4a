"""Log-probabilities of chosen tokens straight from hidden states, without the full logits matrix.

The output layer of a small model is a quarter of its work and nearly all of its memory: 2,000 tokens times 49,152
words are 400 MB of logits, and as much again for each gradient. Here rows are taken in chunks, and what the backward
pass needs is formed while a chunk's probabilities are at hand. For a frozen output layer that is one vector a row, so
nothing is computed twice; where the output layer is trained, a chunk's probabilities are formed a second time in the
backward pass.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["HeadOptions", "linear_logprobs", "linear_logprobs_plain"]

CHUNK_BYTES = 48 * 2**20  # of float32 logits; between 16 and 128 MB the speed is flat within 3%


@dataclass(frozen=True, slots=True)
class HeadOptions:
    """What happens between the output layer's product and the softmax: logits = softcap(scale * (h W^T + b))."""

    scale: float = 1.0
    softcap: float | None = None
    chunk_bytes: int = CHUNK_BYTES


def linear_logprobs_plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: HeadOptions
) -> tuple[Tensor, Tensor]:
    """The same by definition, with full logits; what `linear_logprobs` is tested against."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * options.scale
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    logprobs = torch.log_softmax(logits, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropy.detach()


def linear_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: HeadOptions
) -> tuple[Tensor, Tensor]:
    """log softmax(h W^T + b)[target] and the entropy of the same distribution, in nats.

    hidden: [targets, hidden]. weight: [vocabulary, hidden]. bias: [vocabulary] or None. targets: [targets].
    Returns log-probabilities [targets] (differentiable in hidden, weight and bias) and entropies [targets] (without
    gradient), both float32, or float64 where hidden is.
    """
    logprobs, entropy = _LinearLogprobs.apply(hidden, weight, bias, targets, options)
    return logprobs, entropy


def _chunks(num_rows: int, vocabulary: int, chunk_bytes: int) -> list[slice]:
    rows = max(16, chunk_bytes // (4 * vocabulary))
    num_chunks = max(1, -(-num_rows // rows))
    # equal chunks: a last chunk of three rows would waste the output layer's read
    rows = max(1, -(-num_rows // num_chunks))
    return [slice(i, min(i + rows, num_rows)) for i in range(0, num_rows, rows)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: HeadOptions) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if options.scale != 1.0:
        logits = logits.mul_(options.scale)
    if options.softcap is not None:
        logits = logits.div_(options.softcap).tanh_().mul_(options.softcap)
    return logits


def _logits_gradient(softmax_minus_target: Tensor, logits: Tensor | None, options: HeadOptions) -> Tensor:
    """Through the soft cap and the scale, back to the product h W^T, in place.

    d softcap(z) / dz = 1 - (softcap(z) / c)^2
    """
    gradient = softmax_minus_target
    if options.softcap is not None:
        assert logits is not None
        gradient = gradient.mul_(1 - (logits / options.softcap).square_())
    return gradient.mul_(options.scale) if options.scale != 1.0 else gradient


class _LinearLogprobs(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: HeadOptions
    ) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logprobs = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        head_is_trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        pull = torch.empty_like(hidden) if hidden.requires_grad and not head_is_trained else None
        for rows in _chunks(len(hidden), len(weight), options.chunk_bytes):
            logits = _logits(hidden[rows], weight, bias, options)
            normalizer = logits.logsumexp(-1, keepdim=True)
            target = targets[rows, None]
            logprobs[rows] = (logits.gather(-1, target) - normalizer).squeeze(-1)
            capped = logits.clone() if options.softcap is not None and pull is not None else None
            expected = torch.empty_like(normalizer)
            probabilities = _softmax_with_mean(logits, normalizer, expected)
            entropy[rows] = (normalizer - expected).squeeze(-1)
            if pull is not None:  # d logprob / d hidden = (onehot(target) - softmax) W
                gradient = probabilities.neg_().scatter_add_(-1, target, torch.ones_like(normalizer))
                torch.mm(_logits_gradient(gradient, capped, options).to(weight.dtype), weight, out=pull[rows])
        ctx.save_for_backward(hidden, weight, bias, targets, pull)
        ctx.options = options
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, pull = ctx.saved_tensors
        if pull is not None:
            return (pull * grad_logprobs[:, None].to(pull.dtype)), None, None, None, None
        return (*_backward_through_head(ctx, grad_logprobs, hidden, weight, bias, targets), None, None)


def _softmax_with_mean(logits: Tensor, normalizer: Tensor, expected: Tensor) -> Tensor:
    """softmax of logits; writes sum p * logit into `expected`. One spare buffer the size of the chunk."""
    probabilities = (logits - normalizer).exp_()
    torch.sum(logits.mul_(probabilities), dim=-1, keepdim=True, out=expected)
    return probabilities


def _backward_through_head(
    ctx: Any, grad_logprobs: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    grad_hidden = torch.empty_like(hidden) if needs_hidden else None
    grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs_weight else None
    grad_bias = torch.zeros(len(weight), dtype=wide, device=weight.device) if needs_bias else None
    for rows in _chunks(len(hidden), len(weight), ctx.options.chunk_bytes):
        logits = _logits(hidden[rows], weight, bias, ctx.options)
        capped = logits.clone() if ctx.options.softcap is not None else None
        gradient = torch.softmax(logits, dim=-1).neg_()
        gradient.scatter_add_(-1, targets[rows, None], gradient.new_ones(len(logits), 1))
        gradient = _logits_gradient(gradient, capped, ctx.options).mul_(grad_logprobs[rows, None])
        narrow = gradient.to(weight.dtype)
        if grad_hidden is not None:
            torch.mm(narrow, weight, out=grad_hidden[rows])
        if grad_weight is not None:
            grad_weight += narrow.T @ hidden[rows]
        if grad_bias is not None:
            grad_bias += gradient.sum(0)
    narrow_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
    return grad_hidden, narrow_weight, None if grad_bias is None or bias is None else grad_bias.to(bias.dtype)
