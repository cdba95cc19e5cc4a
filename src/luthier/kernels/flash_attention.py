"""Causal attention over a stream on a CPU: PyTorch's fused kernel, segment by segment, into one buffer.

Through autograd each segment would leave an output of its own, and their join another; here the kernel's two passes are
called by themselves, and what the next layer reads is what the backward pass needs. What goes on from a parent sees two
sets of keys, the parent's and its own, each in its own call. With L the logarithm of a call's sum of exponentials,
attention over both is (exp(L1) A1 + exp(L2) A2) / (exp(L1) + exp(L2)), and each call's backward pass is exact when it
is given that output and the logarithm of that sum (as in ring attention, Liu et al. 2023, arXiv:2310.01889).
"""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from luthier.kernels.streams import Segments

__all__ = ["add_attended", "flash_attention"]

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def flash_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
    """query: [heads, tokens, head size]; key, value: [key heads, tokens, head size]. Returns like query."""
    attended: Tensor = _FlashAttention.apply(query, key, value, segments, scale)
    return attended


class _FlashAttention(Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
        heads, tokens, size = query.shape
        attended = query.new_empty(tokens, heads, size).transpose(0, 1)  # as the next layer reads it
        log_sums = torch.empty(heads, tokens, dtype=torch.promote_types(query.dtype, torch.float32))
        for rows, seen, is_causal in _calls(segments):
            found, logs = _FORWARD(
                query[None, :, rows], key[None, :, seen], value[None, :, seen], 0.0, is_causal, scale=scale
            )
            if is_causal:
                attended[:, rows], log_sums[:, rows] = found[0], logs[0]
            else:
                add_attended(attended[:, rows], log_sums[:, rows], found[0], logs[0])
        ctx.save_for_backward(query, key, value, attended, log_sums)
        ctx.segments, ctx.scale = segments, scale
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, attended, log_sums = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in (query, key, value)]
        num_copies = _copies(len(query), len(key))
        for rows, seen, is_causal in _calls(ctx.segments):
            k, v = (t[:, None, seen].expand(-1, num_copies, -1, -1).flatten(0, 1) for t in (key, value))
            of_rows = (t[None, :, rows] for t in (attended, log_sums))
            found = _BACKWARD(
                grad[None, :, rows], query[None, :, rows], k[None], v[None], *of_rows, 0.0, is_causal, scale=ctx.scale
            )
            for total, place, one in zip(grads, (rows, seen, seen), found, strict=True):
                one = one[0] if len(one[0]) == len(total) else one[0].unflatten(0, (-1, num_copies)).sum(1)
                if is_causal:
                    total[:, place] = one
                else:
                    total[:, place] += one
        return *grads, None, None


def _calls(segments: Segments) -> Iterator[tuple[slice, slice, bool]]:
    """Which rows, which keys they see, and whether only those up to their own place: each segment and itself, then what
    goes on from the same parent, where it lies side by side, and that parent.
    """
    slices = segments.slices
    for own in slices:
        yield own, own, True
    for parent, brothers in groupby(zip(segments.parents, slices, strict=True), key=lambda pair: pair[0]):
        if parent is not None:
            rows = [own for _, own in brothers]
            yield slice(rows[0].start, rows[-1].stop), slices[parent], False


def add_attended(attended: Tensor, log_sums: Tensor, further: Tensor, further_log_sums: Tensor) -> None:
    """Adds, in place, what the same queries see in further keys.

    attended: [..., queries, head size]. log_sums: [..., queries], of the exponentials of their scores.
    """
    both = torch.logaddexp(log_sums, further_log_sums)
    attended.mul_((log_sums - both).exp_()[..., None]).addcmul_(further, (further_log_sums - both).exp_()[..., None])
    log_sums.copy_(both)


def _copies(heads: int, key_heads: int) -> int:
    """How often to write each key head for the backward pass, whose threads take whole ones: 9 query heads with 3 key
    heads of 2,000 tokens took two threads 160 ms, with 9 key heads 115 ms.
    """
    threads = torch.get_num_threads()
    rounds = {number: -(-number // threads) / number for number in (heads, key_heads)}
    return heads // key_heads if rounds[heads] < rounds[key_heads] else 1
