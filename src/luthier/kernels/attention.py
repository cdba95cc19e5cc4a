"""Causal attention over sequences that lie end to end in one stream, without padding.

Each segment attends to itself and to the one that it goes on from, so the work is the sum over sequences, not the
square of the stream. PyTorch's fused kernel does it, but for bfloat16 on a CPU, where its backward pass is slow: there
blocks of queries run as plain matrix products, and the backward pass forms their weights a second time. Neither stores
the scores.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from luthier.kernels.streams import Segments, put_before_each, take_out

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
    segments: Segments,
    *,
    scale: float,
    window: int | None = None,
    prefix: KeysAndValues | None = None,
) -> Tensor:
    """softmax(scale * Q K^T + causal mask) V for every sequence by itself.

    query: [1, heads, tokens, head size]. key, value: [1, key heads, tokens, head size]. segments: add up to tokens; the
    tokens of one see those of its parent too. window: a token sees itself and the window - 1 before it. prefix: stands
    before every sequence. Returns like query.
    """
    if prefix is not None:
        return _behind_prefix(query, key, value, segments, scale=scale, window=window, prefix=prefix)
    assert sum(segments.lengths) == query.shape[2], "segments must add up to the tokens of the stream"
    window = None if window is None or window >= segments.longest else window
    if window is None and query.device.type == "cpu" and query.dtype == torch.bfloat16:
        attended: Tensor = _BlockAttention.apply(query[0], key[0], value[0], segments, scale)
        return attended[None]
    queries, keys, values = (t.split(list(segments.lengths), dim=2) for t in (query, key, value))
    pieces = [
        _fused(q, _behind(keys, i, parent), _behind(values, i, parent), scale, window)
        for i, (q, parent) in enumerate(zip(queries, segments.parents, strict=True))
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def _behind(pieces: tuple[Tensor, ...], number: int, parent: int | None) -> Tensor:
    """A piece with what stands before it."""
    return pieces[number] if parent is None else torch.cat([pieces[parent], pieces[number]], dim=2)


def _behind_prefix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None,
    prefix: KeysAndValues,
) -> Tensor:
    """The prefix has no queries; zeros stand for them, so that every path serves that knows whole sequences alone."""
    num_rows = prefix[0].shape[1]
    rows = (query.new_zeros(query.shape[1], num_rows, query.shape[3]), *prefix)
    q, k, v = (put_before_each(r[None], t, segments, dim=2) for r, t in zip(rows, (query, key, value), strict=True))
    attended = ragged_attention(q, k, v, segments.longer_by(num_rows), scale=scale, window=window)
    return take_out(attended, num_rows, segments, dim=2)


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


def window_mask(num_keys: int, window: int, device: torch.device, *, num_queries: int | None = None) -> Tensor:
    """Which token sees which, [queries, keys]: itself and the window - 1 before it. num_queries: of the last tokens."""
    keys = torch.arange(num_keys, device=device)
    first = 0 if num_queries is None else num_keys - num_queries
    distance = keys[first:, None] - keys
    return (distance >= 0) & (distance < window)


def _fused(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    num_queries, num_keys = query.shape[2], key.shape[2]
    mask = None
    if window is not None or num_queries < num_keys:
        mask = window_mask(num_keys, window or num_keys, query.device, num_queries=num_queries)
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
    """Attention of each segment by its definition, BLOCK_QUERIES at a time. Query heads that share a key head form one
    matrix: [key heads, query heads per key head * queries, head size].
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
        heads, tokens, _ = query.shape
        attended = query.new_empty(tokens, heads, value.shape[2]).transpose(0, 1)  # as the next layer reads it
        for own, before in _places(segments):
            q = _made_up(query[:, own])
            (k, hidden), (v, _) = (_made_up_behind(t, own, before) for t in (key, value))
            for rows in _blocks(q.shape[1]):
                seen = slice(0, k.shape[1] - q.shape[1] + rows.stop)
                _, weights = _attention_weights(q[:, rows], k[:, seen], hidden, scale)
                _write(attended[:, own][:, rows], torch.bmm(weights, v[:, seen]))
        ctx.save_for_backward(query, key, value)
        ctx.segments, ctx.scale = segments, scale
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros(t.shape, device=t.device) for t in (key, value))  # sums stay in float32
        for own, before in _places(ctx.segments):
            q, g = (_made_up(t[:, own]) for t in (query, grad))
            (k, hidden), (v, _) = (_made_up_behind(t, own, before) for t in (key, value))
            sums = _backward_of_one((q, k, v, g), hidden, ctx.scale, into=grad_query[:, own])
            for total, of_one in zip((grad_key, grad_value), sums, strict=True):
                num_own, num_before = own.stop - own.start, before.stop - before.start
                total[:, before] += of_one[:, hidden : hidden + num_before]
                total[:, own] += of_one[:, hidden + num_before :][:, :num_own]
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def _backward_of_one(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor], hidden: int, scale: float, *, into: Tensor
) -> tuple[Tensor, Tensor]:
    """inputs: query, key, value and the gradient of what was attended, of one segment. into: where the queries' goes.
    Returns those of keys and values.
    """
    q, k, v, grad = inputs
    sum_k, sum_v = (torch.zeros(t.shape, device=t.device) for t in (k, v))
    for rows in _blocks(q.shape[1]):
        seen = slice(0, k.shape[1] - q.shape[1] + rows.stop)
        scaled, weights = _attention_weights(q[:, rows], k[:, seen], hidden, scale)
        grouped = grad[:, rows].reshape(len(k), -1, grad.shape[2])
        grad_weights = torch.bmm(grouped, v[:, seen].transpose(1, 2))
        grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        _write(into[:, rows], torch.bmm(grad_scores, k[:, seen]).mul_(scale))
        sum_k[:, seen] += torch.bmm(grad_scores.transpose(1, 2), scaled)
        sum_v[:, seen] += torch.bmm(weights.transpose(1, 2), grouped)
    return sum_k, sum_v


def _places(segments: Segments) -> Iterator[tuple[slice, slice]]:
    """Where each segment lies, and what it goes on from, which may be nothing."""
    slices = segments.slices
    for own, parent in zip(slices, segments.parents, strict=True):
        yield own, slice(0, 0) if parent is None else slices[parent]


def _blocks(tokens: int) -> list[slice]:
    return [slice(i, min(i + BLOCK_QUERIES, tokens)) for i in range(0, tokens, BLOCK_QUERIES)]


def _made_up(piece: Tensor) -> Tensor:
    """[heads, tokens, size] and zeros up to a multiple of BLOCK_MULTIPLE tokens, which no earlier token sees."""
    return torch.nn.functional.pad(piece, (0, 0, 0, -piece.shape[1] % BLOCK_MULTIPLE))


def _made_up_behind(stream: Tensor, own: slice, before: slice) -> tuple[Tensor, int]:
    """A segment behind what it goes on from, and how many zeros stand before both, which no token sees."""
    hidden = -(before.stop - before.start) % BLOCK_MULTIPLE
    if before.stop == before.start:
        return _made_up(stream[:, own]), 0
    return torch.cat(
        [stream.new_zeros(len(stream), hidden, stream.shape[2]), stream[:, before], _made_up(stream[:, own])], 1
    ), hidden


def _write(target: Tensor, grouped: Tensor) -> None:
    """target: [heads, queries, size], perhaps fewer queries than `grouped` was made up to."""
    target.copy_(grouped.view(len(target), -1, target.shape[2])[:, : target.shape[1]])


def _attention_weights(query: Tensor, key: Tensor, hidden: int, scale: float) -> tuple[Tensor, Tensor]:
    """The queries of a block, grouped and scaled, and softmax of their products with the keys up to the last query's
    own, but for the first `hidden` of them.

    The products stay in float32: in bfloat16 a score of 300, not rare where keys have a bias, would be off by one nat.
    """
    num_queries = query.shape[1]
    scaled = query.reshape(len(key), -1, query.shape[2]).float() * scale
    scores = torch.bmm(scaled, key.transpose(1, 2).float())
    later = torch.ones(num_queries, num_queries, dtype=torch.bool, device=query.device).triu_(1)
    by_head = scores.view(len(query), num_queries, -1)
    by_head[..., -num_queries:].masked_fill_(later, -torch.inf)
    by_head[..., :hidden] = -torch.inf
    return scaled.to(query.dtype), torch.softmax(scores, dim=-1).to(query.dtype)
