"""What llama.cpp changes in a model of each architecture, and how it is undone: names, order of rows, norms, settings.

One row an architecture. A tensor or a way of scaling positions that no row understands is refused, never guessed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from luthier.errors import ModelError
from luthier.models.gguf_header import Header
from luthier.models.weights import LazyTensor

__all__ = ["ARCHITECTURES", "Architecture"]

Settings = dict[str, Any]
Tensors = Mapping[str, LazyTensor]

_ENDS = {"output": "lm_head", "output_norm": "model.norm", "token_embd": "model.embed_tokens"}
_BLOCK = {
    "attn_k": "self_attn.k_proj",
    "attn_norm": "input_layernorm",
    "attn_output": "self_attn.o_proj",
    "attn_q": "self_attn.q_proj",
    "attn_v": "self_attn.v_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.up_proj",
}
_HEAD_NORMS = {"attn_k_norm": "self_attn.k_norm", "attn_q_norm": "self_attn.q_norm"}
_FOUR_NORMS = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_FREQUENCIES = "rope_freqs.weight"
_LLAMA3_CONTEXT, _LLAMA3_LOW, _LLAMA3_HIGH = 8192, 1.0, 4.0
_GEMMA3_LOCAL_THETA, _GEMMA3_FULL_EVERY, _GEMMA3_27B_LAYERS = 10_000.0, 6, 62


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one architecture is read.

    blocks: names inside a layer, llama.cpp's to Hugging Face's.  own: the settings that only it has.
    permuted: rows of q and k are interleaved for llama.cpp's rotary embedding.
    shifted: norm weights are stored as 1 + w.
    """

    model_type: str
    blocks: Mapping[str, str]
    own: Callable[[Header, Tensors], Settings]
    permuted: bool = False
    shifted: bool = False

    def settings(self, header: Header, tensors: Tensors) -> Settings:
        """The fields of the Hugging Face configuration."""
        return _shared(header, tensors) | self.own(header, tensors)

    def tensors(self, header: Header, tensors: Tensors) -> list[LazyTensor]:
        """The tensors under their Hugging Face names, with rows and values as they were. Raises ModelError."""
        return [self._converted(header, tensor) for name, tensor in tensors.items() if name != _FREQUENCIES]

    def _converted(self, header: Header, tensor: LazyTensor) -> LazyTensor:
        name = self._name(header, tensor.name)
        if self.permuted and (".attn_q." in tensor.name or ".attn_k." in tensor.name):
            heads = _num_heads(header) if ".attn_q." in tensor.name else _num_kv_heads(header)
            return replace(tensor, name=name, read=lambda: _unpermuted(tensor.read(), heads))
        if self.shifted and name.endswith("norm.weight"):
            return replace(tensor, name=name, read=lambda: tensor.read() - np.float32(1))
        return replace(tensor, name=name)

    def _name(self, header: Header, name: str) -> str:
        stem, _, kind = name.rpartition(".")
        block, _, index = stem.removeprefix("blk.").partition(".")
        if stem in _ENDS:
            return f"{_ENDS[stem]}.{kind}"
        if stem.startswith("blk.") and index in self.blocks:
            return f"model.layers.{block}.{self.blocks[index]}.{kind}"
        raise ModelError(
            f"{header.file}: the tensor {name} is not known in the architecture {header.architecture}; "
            "use the model's safetensors folder instead"
        )


def _unpermuted(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """From (pair, half) order within each head, which llama.cpp rotates, to (half, pair). rows: [heads * size, ...]"""
    pairs = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _num_heads(header: Header) -> int:
    return int(header.number("attention.head_count"))


def _num_kv_heads(header: Header) -> int:
    return int(header.number("attention.head_count_kv", _num_heads(header)))


def _shared(header: Header, tensors: Tensors) -> Settings:
    hidden_size = int(header.number("embedding_length"))
    if "token_embd.weight" not in tensors:
        raise ModelError(f"{header.file}: has no token embeddings; a file of one model in several parts must be joined")
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": int(header.number("block_count")),
        "intermediate_size": int(header.number("feed_forward_length")),
        "num_attention_heads": _num_heads(header),
        "num_key_value_heads": _num_kv_heads(header),
        "head_dim": int(header.number("attention.key_length", hidden_size // _num_heads(header))),
        "max_position_embeddings": int(header.number("context_length")),
        "rms_norm_eps": _shortest(header.number("attention.layer_norm_rms_epsilon")),
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": _rope(header, tensors),
    }


def _shortest(value: float) -> float:
    """The shortest decimal that is the same number in fp32, which is how GGUF stores it: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def _rope(header: Header, tensors: Tensors) -> Settings:
    theta = _shortest(header.number("rope.freq_base", 10_000.0))
    kind = header.setting("rope.scaling.type", "none")
    if _FREQUENCIES in tensors:
        return _llama3_rope(header, theta, tensors[_FREQUENCIES].read())
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind not in ("linear", "yarn"):
        raise ModelError(f"{header.file}: scales positions the way {kind!r}, which is not known; use safetensors")
    scaled = {"rope_type": kind, "rope_theta": theta, "factor": _shortest(header.number("rope.scaling.factor"))}
    if kind == "yarn":
        scaled["original_max_position_embeddings"] = int(header.number("rope.scaling.original_context_length"))
    return scaled


def _llama3_rope(header: Header, theta: float, divisors: np.ndarray) -> Settings:
    """Llama 3.1 and later store what each frequency is divided by; that must be the published rule's result."""
    factor = float(divisors.max())
    turns = _LLAMA3_CONTEXT * theta ** (-np.arange(len(divisors)) / len(divisors)) / (2 * np.pi)
    smooth = np.clip((turns - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW), 0, 1)
    if not np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise ModelError(f"{header.file}: its rotary frequencies are not scaled by Llama 3's rule; use safetensors")
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_CONTEXT,
    }


def _llama(header: Header, tensors: Tensors) -> Settings:
    return {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}


def _qwen(header: Header, tensors: Tensors) -> Settings:
    return {"use_sliding_window": False}


def _gemma3(header: Header, tensors: Tensors) -> Settings:
    num_layers, rope = int(header.number("block_count")), _rope(header, tensors)
    size = int(header.number("attention.key_length"))
    if num_layers == _GEMMA3_27B_LAYERS:  # the one size whose scores are not scaled by the head's size
        size = int(header.number("embedding_length")) // _num_heads(header)
    full = [(layer + 1) % _GEMMA3_FULL_EVERY == 0 for layer in range(num_layers)]
    return {
        "layer_types": ["full_attention" if is_full else "sliding_attention" for is_full in full],
        "query_pre_attn_scalar": size,
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": _GEMMA3_LOCAL_THETA},
        },
        "sliding_window": int(header.number("attention.sliding_window")),
    }


ARCHITECTURES = {
    "gemma3": Architecture("gemma3_text", _BLOCK | _HEAD_NORMS | _FOUR_NORMS, _gemma3, shifted=True),
    "llama": Architecture("llama", _BLOCK, _llama, permuted=True),
    "qwen2": Architecture("qwen2", _BLOCK, _qwen),
    "qwen3": Architecture("qwen3", _BLOCK | _HEAD_NORMS, _qwen),
}
