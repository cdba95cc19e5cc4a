"""Attention of answers in the making: one new token of each, over the prompt that its group shares and its own tokens.

A prompt's keys and values are there once, however many answers go on from it, and are read once for all of them. An
answer's own lie in a place of its own that is reserved at the start; memory that was never written takes no room. On a
CPU, PyTorch's fused kernel sees the two sets of keys in a call each, joined by the logarithms of their sums; elsewhere,
and where a window hides old keys, the two are laid together.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from luthier.kernels.flash_attention import add_attended

__all__ = ["Decoding", "OwnKeys", "PromptKeys", "PromptPairs", "decode_attention"]

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


PromptPairs = Mapping[int, tuple[Tensor, Tensor]]
"""A prompt's keys and values by layer, [key heads, tokens, head size] both."""


class PromptKeys:
    """Keys and values of prompts, by layer, as their forward pass leaves them. lengths: tokens of each prompt."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)
        self.layers: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def keep(self, layer: int, key: Tensor, value: Tensor) -> None:
        """key, value: [key heads, tokens, head size], the prompts end to end, and perhaps more behind them."""
        pieces = (t[:, : sum(self.lengths)].split(self.lengths, dim=1) for t in (key, value))
        self.layers[layer] = [(k.contiguous(), v.contiguous()) for k, v in zip(*pieces, strict=True)]

    def of(self, prompt: int) -> PromptPairs:
        """Of one prompt."""
        return {layer: pairs[prompt] for layer, pairs in self.layers.items()}


class OwnKeys:
    """Keys and values of answers, [rows, key heads, longest, head size] a layer, reserved when a layer first writes."""

    def __init__(self, num_rows: int, longest: int) -> None:
        self.num_rows, self.longest = num_rows, longest
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's room. key, value: [key heads, tokens, head size], whose like it holds."""
        if layer not in self.layers:
            keys, values = (_zeros((self.num_rows, t.shape[0], self.longest, t.shape[2]), t) for t in (key, value))
            self.layers[layer] = keys, values
        return self.layers[layer]

    def keep_only(self, rows: Sequence[int], num_tokens: int) -> None:
        """These rows, rising, become the first ones; num_tokens: as far as they are written."""
        moved = [(new, old) for new, old in enumerate(rows) if new != old]
        for pair in self.layers.values():
            for room in pair:
                for new, old in moved:
                    room[new, :, :num_tokens] = room[old, :, :num_tokens]


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros, since what is hidden must still be finite; on a CPU of memory that is taken when it is written to."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    num_bytes = math.prod(shape) * like.element_size()
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(like.dtype).view(shape)


@dataclass(frozen=True, slots=True)
class Decoding:
    """One step of `lengths.numel()` answers, whose new tokens are the stream.

    own: where their keys go. lengths: [rows], own tokens before this one. prompts: which rows go on from which prompt,
    rising and without gaps. positions: [rows], of the new tokens, counted from the prompt's first.
    """

    own: OwnKeys
    lengths: Tensor
    positions: Tensor
    prompts: Sequence[tuple[slice, PromptPairs]]
    longest: int
    mask: Tensor | None

    @classmethod
    def of(
        cls,
        own: OwnKeys,
        lengths: Sequence[int],
        prompts: Sequence[tuple[slice, PromptPairs]],
        positions: Tensor,
        dtype: torch.dtype,
    ) -> "Decoding":
        """dtype: of the model's activations."""
        device, longest = positions.device, max(lengths) + 1
        rows = torch.tensor(lengths, device=device)
        mask = None
        if min(lengths) + 1 < longest:
            hidden = torch.arange(longest, device=device) > rows[:, None]
            mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)[:, None, None]
        return cls(own, rows, positions, prompts, longest, mask)

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Puts the new tokens' keys and values behind their rows' own; returns all own ones, [rows, key heads, longest,
        head size]. key, value: [key heads, rows, head size].
        """
        num_rows, rooms = key.shape[1], self.own.of(layer, key, value)
        for room, new in zip(rooms, (key, value), strict=True):
            if self.mask is None:
                room[:num_rows, :, self.longest - 1] = new.transpose(0, 1)
            else:
                room[torch.arange(num_rows, device=room.device), :, self.lengths] = new.transpose(0, 1)
        keys, values = (room[:num_rows, :, : self.longest] for room in rooms)
        return keys, values


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, decoding: Decoding, layer: int, *, scale: float, window: int | None
) -> Tensor:
    """softmax(scale * q K^T) V of each row's new token, over its prompt and all its own tokens up to the new one.

    query: [1, heads, rows, head size]; key, value: [1, key heads, rows, head size]. window: a token sees itself and the
    window - 1 before it. Returns [1, rows, heads, head size].
    """
    keys, values = decoding.write(layer, key[0], value[0])
    heads, num_rows, size = query.shape[1:]
    queries = query[0].transpose(0, 1).reshape(num_rows, len(key[0]), -1, size)  # those of a key head side by side
    total = max(own.shape[1] for _, prompt in decoding.prompts for own in prompt[layer][:1]) + decoding.longest
    if window is not None and window >= total:
        window = None
    if window is None and query.device.type == "cpu" and size == values.shape[3]:
        attended = _by_two_calls(queries, keys, values, decoding, layer, scale)
    else:
        attended = _laid_together(queries, keys, values, decoding, layer, scale, window)
    joined: Tensor = attended.reshape(1, num_rows, heads, values.shape[3])
    return joined


def _by_two_calls(
    queries: Tensor, keys: Tensor, values: Tensor, decoding: Decoding, layer: int, scale: float
) -> Tensor:
    """queries: [rows, key heads, queries of each, size]; keys, values: [rows, key heads, longest, size]."""
    attended: Tensor
    attended, log_sums = _FORWARD(queries, keys, values, 0.0, False, attn_mask=decoding.mask, scale=scale)
    for rows, prompt in decoding.prompts:
        k, v = prompt[layer]
        own = queries[rows].transpose(0, 1)  # the prompt's keys are the same for all rows, so rows count as queries
        found, logs = _FORWARD(own.flatten(1, 2)[None], k[None], v[None], 0.0, False, scale=scale)
        found = found[0].unflatten(1, own.shape[1:3]).transpose(0, 1)
        add_attended(attended[rows], log_sums[rows], found, logs[0].unflatten(1, own.shape[1:3]).transpose(0, 1))
    return attended


def _laid_together(
    queries: Tensor, keys: Tensor, values: Tensor, decoding: Decoding, layer: int, scale: float, window: int | None
) -> Tensor:
    """The same by one call a group, with its prompt's keys before each row's own."""
    attended = []
    for rows, prompt in decoding.prompts:
        count, length = rows.stop - rows.start, prompt[layer][0].shape[1]
        k, v = (
            torch.cat([shared.expand(count, -1, -1, -1), own[rows]], dim=2)
            for shared, own in zip(prompt[layer], (keys, values), strict=True)
        )
        place = torch.arange(length + decoding.longest, device=k.device)
        last = length + decoding.lengths[rows, None]
        seen = place <= last
        if window is not None:
            seen &= place > last - window
        attended.append(
            torch.nn.functional.scaled_dot_product_attention(
                queries[rows], k, v, attn_mask=seen[:, None, None], scale=scale
            )
        )
    return torch.cat(attended)
