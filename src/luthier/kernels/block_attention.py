"""Causal attention over a stream by plain matrix products, a block of queries at a time.

The backward pass forms the weights of a block a second time, so that no scores are stored.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from luthier.kernels.streams import Segments
from luthier.kernels.turns import slices, turns

__all__ = ["BLOCK_QUERIES", "block_attention"]

BLOCK_QUERIES = 128  # on two AVX-512 cores 446 tokens took 9 ms, the fused kernel 15; 1,024 tokens 36 and 43
BLOCK_MULTIPLE = 32  # each size of a product is compiled once and kept: 2 ms and 0.6 MB


def block_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
    """query: [heads, tokens, head size]; key, value: [key heads, tokens, head size]. Returns like query."""
    attended: Tensor = _BlockAttention.apply(query, key, value, segments, scale)
    return attended


class _BlockAttention(Function):
    """Attention of each segment by its definition, BLOCK_QUERIES at a time. Query heads that share a key head form one
    matrix: [key heads, query heads per key head * queries, head size].
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
        heads, tokens, _ = query.shape
        attended = query.new_empty(tokens, heads, value.shape[2]).transpose(0, 1)  # as the next layer reads it
        for own, before in turns(_places(segments), _sizes, over=query):
            _attend(query, key, value, (own, before), scale, into=attended[:, own])
        ctx.save_for_backward(query, key, value)
        ctx.segments, ctx.scale = segments, scale
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros(t.shape, device=t.device) for t in (key, value))  # sums stay in float32
        for own, before in turns(_places(ctx.segments), _sizes, over=query):
            place, into = (own, before), (grad_query[:, own], grad_key, grad_value)
            _add_gradients((query, key, value, grad), place, ctx.scale, into=into)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, place: tuple[slice, slice], scale: float, *, into: Tensor
) -> None:
    """What the queries of one segment see. place: of the segment and of what it goes on from."""
    q = _made_up(query[:, place[0]])
    (k, hidden), (v, _) = (_made_up_behind(t, *place) for t in (key, value))
    for rows in turns(slices(q.shape[1], BLOCK_QUERIES), _ends, over=q):
        seen = slice(0, k.shape[1] - q.shape[1] + rows.stop)
        _write(into[:, rows], torch.bmm(_attention_weights(q[:, rows], k[:, seen], hidden, scale)[1], v[:, seen]))


def _add_gradients(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    place: tuple[slice, slice],
    scale: float,
    *,
    into: tuple[Tensor, Tensor, Tensor],
) -> None:
    """inputs: query, key, value and the gradient of what was attended, of all segments. place: of one of them and of
    what it goes on from. into: where the gradient of its queries goes, and those of all keys and values.
    """
    own, before = place
    q, g = (_made_up(t[:, own]) for t in (inputs[0], inputs[3]))
    (k, hidden), (v, _) = (_made_up_behind(t, own, before) for t in inputs[1:3])
    sums = [torch.zeros(t.shape, device=t.device) for t in (k, v)]
    for rows in turns(slices(q.shape[1], BLOCK_QUERIES), _ends, over=q):
        seen = slice(0, k.shape[1] - q.shape[1] + rows.stop)
        _add_of_block((q[:, rows], k[:, seen], v[:, seen], g[:, rows]), hidden, scale, sums, into=into[0][:, rows])
    for total, of_one in zip(into[1:], sums, strict=True):
        num_own, num_before = own.stop - own.start, before.stop - before.start
        total[:, before] += of_one[:, hidden : hidden + num_before]
        total[:, own] += of_one[:, hidden + num_before :][:, :num_own]


def _add_of_block(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor], hidden: int, scale: float, sums: list[Tensor], *, into: Tensor
) -> None:
    """inputs: the queries of a block, the keys and values that they see, and the gradient of what was attended. sums:
    gets what is added to the gradients of keys and of values. into: where the queries' goes.
    """
    q, k, v, grad = inputs
    scaled, weights = _attention_weights(q, k, hidden, scale)
    grouped = grad.reshape(len(k), -1, grad.shape[2])
    grad_weights = torch.bmm(grouped, v.transpose(1, 2))
    grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    _write(into, torch.bmm(grad_scores, k).mul_(scale))
    sums[0][:, : k.shape[1]] += torch.bmm(grad_scores.transpose(1, 2), scaled)
    sums[1][:, : k.shape[1]] += torch.bmm(weights.transpose(1, 2), grouped)


def _places(segments: Segments) -> list[tuple[slice, slice]]:
    """Where each segment lies, and what it goes on from, which may be nothing."""
    places = segments.slices
    return [
        (own, slice(0, 0) if parent is None else places[parent])
        for own, parent in zip(places, segments.parents, strict=True)
    ]


def _sizes(place: tuple[slice, slice]) -> tuple[int, ...]:
    """What the bytes of a segment's turn grow with: its tokens and those that it goes on from, as they are made up, and
    whether its own need no making up, for then they keep the stream's strides and are copied once more.
    """
    own, before = (part.stop - part.start for part in place)
    return own + -own % BLOCK_MULTIPLE, before + -before % BLOCK_MULTIPLE, own % BLOCK_MULTIPLE == 0


def _ends(rows: slice) -> tuple[int, int]:
    """How many queries a block has, and where it ends."""
    return rows.stop - rows.start, rows.stop


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
