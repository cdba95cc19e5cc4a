"""Luthier's attention, offered to transformers through its own registry, so that no model is patched.

A forward pass that brings `segment_lengths` along runs ragged attention over a stream of sequences; every other pass
(generation with a cache, a batch with padding) is handed on to transformers' own attention.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from luthier.kernels.attention import ragged_attention, window_mask

__all__ = ["ATTENTION", "register_attention", "supports_ragged"]

ATTENTION = "luthier"


def register_attention() -> None:
    """Makes attn_implementation="luthier" known to transformers; may be called again."""
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _mask)


def supports_ragged(config: PretrainedConfig) -> bool:
    """Whether ragged attention computes what the architecture asks for: no soft cap on scores, no learned sinks."""
    return getattr(config, "attn_logit_softcapping", None) is None and config.model_type not in {"gpt_oss"}


def _mask(
    batch_size: int, q_length: int, kv_length: int, *, attention_mask: Tensor | None = None, **options: Any
) -> Tensor | None:
    """None for whole sequences without padding, where `_attention` knows what a token sees; else transformers' mask."""
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(batch_size, q_length, kv_length, attention_mask=attention_mask, **options)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    segment_lengths: Sequence[int] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    if segment_lengths is None:
        if attention_mask is None and sliding_window is not None and query.shape[2] == key.shape[2]:
            attention_mask = window_mask(query.shape[2], sliding_window, query.device)
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return output, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attended = ragged_attention(query, key, value, segment_lengths, scale=scale, window=sliding_window)
    return attended.transpose(1, 2), None
