"""Luthier's attention, offered to transformers through its own registry, so that no model is patched.

A forward pass that brings `segments` along runs ragged attention over a stream of sequences; every other pass
(generation with a cache, a batch with padding) is handed on to transformers' own attention. Either sees the keys and
values of a `prefix`, if a pass brings one along. A pass over prompts leaves their keys in `prompt_keys`, and one that
brings `decoding` along is a step of answers in the making.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from luthier.kernels.attention import ATTENTION, KeysAndValues, put_prefix, ragged_attention, window_mask
from luthier.kernels.decoding import Decoding, PromptKeys, decode_attention
from luthier.kernels.streams import Segments

__all__ = ["ATTENTION", "RAGGED", "register_attention", "supports_ragged"]

RAGGED = frozenset(
    {
        *("apertus", "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma3_text", "glm", "glm4"),
        *("gpt_neox", "granite", "llama", "mistral", "mixtral", "olmo", "olmo2", "olmo3", "opt", "phi", "phi3"),
        *("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "starcoder2"),
    }
)
_LEFT_OUT = ("attention_chunk_size", "attention_dropout", "attn_logit_softcapping", "use_bidirectional_attention")


def register_attention() -> None:
    """Makes attn_implementation="luthier" known to transformers; may be called again."""
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _mask)


def supports_ragged(config: PretrainedConfig) -> bool:
    """Whether a ragged stream gives what the architecture gives to each sequence alone; only what is tested does.

    Not where scores are capped or dropped, where a token sees later ones, or where rotary positions depend on the
    longest sequence at hand. Recurrent layers and convolutions would carry one sequence into the next.
    """
    if config.model_type not in RAGGED or any(getattr(config, name, None) for name in _LEFT_OUT):
        return False
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    return not kinds & {"dynamic", "longrope"}


def _mask(
    batch_size: int, q_length: int, kv_length: int, *, attention_mask: Tensor | None = None, **options: Any
) -> Tensor | None:
    """None for whole sequences without padding, where `_attention` knows what a token sees; else transformers' mask."""
    if attention_mask is None and q_length == kv_length:
        return None
    mask: Tensor | None = sdpa_mask(batch_size, q_length, kv_length, attention_mask=attention_mask, **options)
    return mask


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    position_ids: Tensor | None = None,
    prefix: Sequence[KeysAndValues] | None = None,
    prompt_keys: PromptKeys | None = None,
    decoding: Decoding | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    window = options.pop("sliding_window", getattr(module, "sliding_window", None))  # Qwen2MoE passes none along
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if decoding is not None:
        return decode_attention(query, key, value, decoding, module.layer_idx, scale=scale, window=window), None
    if prompt_keys is not None:
        prompt_keys.keep(module.layer_idx, key[0], value[0])
    before = None if prefix is None else _cast(prefix[module.layer_idx], key.dtype)
    if segments is None:
        if attention_mask is None and window is not None and query.shape[2] == key.shape[2]:
            attention_mask = window_mask(query.shape[2], window, query.device)
        if before is not None:
            key, value, attention_mask = put_prefix(
                *(key, value, attention_mask, before),
                num_queries=query.shape[2],
                positions=position_ids,
                window=window,
            )
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return output, None
    attended = ragged_attention(query, key, value, segments, scale=scale, window=window, prefix=before)
    return attended.transpose(1, 2), None


def _cast(prefix: KeysAndValues, dtype: torch.dtype) -> KeysAndValues:
    keys, values = prefix
    return keys.to(dtype), values.to(dtype)
