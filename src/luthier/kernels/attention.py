"""Causal attention over sequences that lie end to end in one stream, without a mask and without padding.

Each sequence attends to itself alone, so the work is the sum of the squares of the lengths, not the square of the
sum. PyTorch's fused kernel does it, but for bfloat16 on a CPU, where its backward pass is slow: there blocks of queries
run as plain matrix products, and the backward pass forms their weights a second time. Neither stores the scores.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from luthier.kernels.streams import put_before_each, take_out

__all__ = ["ATTENTION", "KeysAndValues", "put_prefix", "ragged_attention", "window_mask"]

ATTENTION = "luthier"  # what transformers knows it by

BLOCK_QUERIES = 128  # on two AVX-512 cores 446 tokens took 9 ms, the fused kernel 15; 1,024 tokens 36 and 43
BLOCK_MULTIPLE = 32  # each size of a product is compiled once and kept: 2 ms and 0.6 MB


KeysAndValues = tuple[Tensor, Tensor]
"""Of a prefix: what stands before every text as if of tokens that came first, [key heads, virtual tokens, head size]
both.
"""


def ragged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
    prefix: KeysAndValues | None = None,
) -> Tensor:
    """softmax(scale * Q K^T + causal mask) V for every sequence by itself.

    query: [1, heads, tokens, head size]. key, value: [1, key heads, tokens, head size]. lengths: tokens of each
    sequence, in order, adding up to tokens. window: a token sees itself and the window - 1 before it. prefix: stands
    before every sequence. Returns like query.
    """
    if prefix is not None:
        return _behind_prefix(query, key, value, lengths, scale=scale, window=window, prefix=prefix)
    assert sum(lengths) == query.shape[2], "lengths must add up to the tokens of the stream"
    unbounded = window is None or window >= max(lengths)
    if unbounded and query.device.type == "cpu" and query.dtype == torch.bfloat16:
        attended: Tensor = _BlockAttention.apply(query[0], key[0], value[0], lengths, scale)
        return attended[None]
    splits = [list(lengths), list(lengths), list(lengths)]
    pieces = [
        _fused(q, k, v, scale, window)
        for q, k, v in zip(*(t.split(s, dim=2) for t, s in zip((query, key, value), splits, strict=True)), strict=True)
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def _behind_prefix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    *,
    scale: float,
    window: int | None,
    prefix: KeysAndValues,
) -> Tensor:
    """The prefix has no queries; zeros stand for them, so that every path serves that knows whole sequences alone."""
    num_rows = prefix[0].shape[1]
    rows = (query.new_zeros(query.shape[1], num_rows, query.shape[3]), *prefix)
    q, k, v = (put_before_each(r[None], t, lengths, dim=2) for r, t in zip(rows, (query, key, value), strict=True))
    attended = ragged_attention(q, k, v, [num_rows + n for n in lengths], scale=scale, window=window)
    return take_out(attended, num_rows, lengths, dim=2)


def put_prefix(
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    prefix: KeysAndValues,
    *,
    num_queries: int,
    positions: Tensor | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and mask of a padded batch with a prefix before them.

    key, value: [sequences, key heads, keys, head size]. mask: [..., queries, keys], of booleans or added to the scores;
    None where queries and keys begin with the same token, or for one query that sees all. positions: of the
    queries behind the prefix, [sequences or 1, queries], needed with a window: a token sees itself and the window - 1
    before it.
    """
    num_rows, num_keys = prefix[0].shape[1], key.shape[2]
    key, value = (
        torch.cat([p.expand(len(t), -1, -1, -1), t], dim=2) for p, t in zip(prefix, (key, value), strict=True)
    )
    if mask is None and num_queries == 1 and window is None:
        return key, value, None
    if mask is None:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=key.device)
        mask = mask.tril_() if num_queries > 1 else mask
    mask = mask[(None,) * (4 - mask.dim())]
    seen = torch.ones(1, 1, num_queries, num_rows, dtype=torch.bool, device=key.device)
    if window is not None:
        assert positions is not None, "a window is counted by positions"
        seen = positions[:, None, :, None] - torch.arange(num_rows, device=key.device) < window
    if mask.dtype != torch.bool:
        seen = torch.zeros(seen.shape, dtype=mask.dtype, device=mask.device).masked_fill_(~seen, -torch.inf)
    rows = torch.broadcast_shapes(seen.shape[:3], mask.shape[:3])
    return key, value, torch.cat([seen.expand(*rows, -1), mask.expand(*rows, -1)], dim=-1)


def window_mask(tokens: int, window: int, device: torch.device) -> Tensor:
    """Which token sees which, [tokens, tokens]: itself and the window - 1 before it."""
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril_().triu_(1 - window)


def _fused(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    tokens = query.shape[2]
    mask = None if window is None or window >= tokens else window_mask(tokens, window, query.device)
    return torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


class _BlockAttention(Function):
    """Attention of each sequence by its definition, BLOCK_QUERIES at a time. Query heads that share a key head form one
    matrix: [key heads, query heads per key head * queries, head size].
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
        heads, tokens, _ = query.shape
        attended = query.new_empty(tokens, heads, value.shape[2]).transpose(0, 1)  # as the next layer reads it
        for sequence in _slices(lengths):
            q, k, v = (_made_up(t[:, sequence]) for t in (query, key, value))
            for rows in _blocks(q.shape[1]):
                _, weights = _attention_weights(q, k, rows, scale)
                _write(attended[:, sequence][:, rows], torch.bmm(weights, v[:, : rows.stop]))
        ctx.save_for_backward(query, key, value)
        ctx.lengths, ctx.scale = lengths, scale
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        grads = tuple(torch.empty_like(t) for t in (query, key, value))
        for sequence in _slices(ctx.lengths):
            pieces = [_made_up(t[:, sequence]) for t in (query, key, value, grad)]
            _backward_of_one(pieces, ctx.scale, into=[t[:, sequence] for t in grads])
        return (*grads, None, None)


def _backward_of_one(inputs: list[Tensor], scale: float, *, into: list[Tensor]) -> None:
    """inputs: query, key, value and the gradient of what was attended, of one sequence. into: where theirs go."""
    q, k, v, grad = inputs
    grad_q, grad_k, grad_v = into
    sum_k, sum_v = (torch.zeros(t.shape, device=t.device) for t in (k, v))  # over the blocks, in float32
    for rows in _blocks(q.shape[1]):
        scaled, weights = _attention_weights(q, k, rows, scale)
        seen = slice(0, rows.stop)
        grouped = grad[:, rows].reshape(len(k), -1, grad.shape[2])
        grad_weights = torch.bmm(grouped, v[:, seen].transpose(1, 2))
        grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        _write(grad_q[:, rows], torch.bmm(grad_scores, k[:, seen]).mul_(scale))
        sum_k[:, seen] += torch.bmm(grad_scores.transpose(1, 2), scaled)
        sum_v[:, seen] += torch.bmm(weights.transpose(1, 2), grouped)
    grad_k.copy_(sum_k[:, : grad_k.shape[1]])
    grad_v.copy_(sum_v[:, : grad_v.shape[1]])


def _slices(lengths: Sequence[int]) -> list[slice]:
    return [slice(stop - n, stop) for stop, n in zip(accumulate(lengths), lengths, strict=True)]


def _blocks(tokens: int) -> list[slice]:
    return [slice(i, min(i + BLOCK_QUERIES, tokens)) for i in range(0, tokens, BLOCK_QUERIES)]


def _made_up(piece: Tensor) -> Tensor:
    """[heads, tokens, size] and zeros up to a multiple of BLOCK_MULTIPLE tokens, which no earlier token sees."""
    return torch.nn.functional.pad(piece, (0, 0, 0, -piece.shape[1] % BLOCK_MULTIPLE))


def _write(target: Tensor, grouped: Tensor) -> None:
    """target: [heads, queries, size], perhaps fewer queries than `grouped` was made up to."""
    target.copy_(grouped.view(len(target), -1, target.shape[2])[:, : target.shape[1]])


def _attention_weights(query: Tensor, key: Tensor, rows: slice, scale: float) -> tuple[Tensor, Tensor]:
    """The queries of a block, grouped and scaled, and softmax of their products with the keys up to the block's end.

    The products stay in float32: in bfloat16 a score of 300, not rare where keys have a bias, would be off by one nat.
    """
    num_queries = rows.stop - rows.start
    scaled = query[:, rows].reshape(len(key), -1, query.shape[2]).float() * scale
    scores = torch.bmm(scaled, key[:, : rows.stop].transpose(1, 2).float())
    later = torch.ones(num_queries, num_queries, dtype=torch.bool, device=query.device).triu_(1)
    scores.view(len(query), num_queries, -1)[..., rows.start :].masked_fill_(later, -torch.inf)
    return scaled.to(query.dtype), torch.softmax(scores, dim=-1).to(query.dtype)
