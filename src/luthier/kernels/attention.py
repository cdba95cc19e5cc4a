"""Causal attention over sequences that lie end to end in one stream, without padding.

Each segment attends to itself and to the one that it goes on from, so the work is the sum over sequences, not the
square of the stream. Neither way of computing it stores the scores: PyTorch's fused kernel, on a CPU by
`flash_attention`, or for bfloat16 on a CPU, where that kernel's backward pass is slow, `block_attention`.
"""

import torch
from torch import Tensor

from luthier.kernels.block_attention import block_attention
from luthier.kernels.flash_attention import flash_attention
from luthier.kernels.streams import Segments, put_before_each, take_out

__all__ = ["ATTENTION", "KeysAndValues", "put_prefix", "ragged_attention", "window_mask"]

ATTENTION = "luthier"  # what transformers knows it by

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
    if window is None and query.device.type == "cpu":
        if query.dtype == torch.bfloat16:
            return block_attention(query[0], key[0], value[0], segments, scale)[None]
        if query.shape[3] == value.shape[3]:
            return flash_attention(query[0], key[0], value[0], segments, scale)[None]
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
