"""Tiny chat models of several architectures: two layers from a configuration and a seed, and a tokenizer of bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from luthier.models.attention import ATTENTION, register_attention, supports_ragged
from luthier.models.load import Model
from luthier.models.sources import ResolvedSource

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LAYERS = ["sliding_attention", "full_attention"]
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma3_text": {"sliding_window": 4, "layer_types": LAYERS, "query_pre_attn_scalar": 16},
    "mistral": {"sliding_window": 4},
    "gpt_neox": {},
    "gemma2": {"sliding_window": 4, "layer_types": LAYERS, "query_pre_attn_scalar": 16},  # run by transformers
}
END = 257  # <|im_end|>


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=TEMPLATE)


@pytest.fixture(scope="session")
def tiny(byte_tokenizer: PreTrainedTokenizerFast) -> Callable[..., Model]:
    """Builds one; its random weights are so large that answers differ by prompt, and some end by themselves."""

    def build(architecture: str = "llama", **settings: Any) -> Model:
        register_attention()
        ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
        config = AutoConfig.for_model(architecture, **(ends | sizes | heads | ARCHITECTURES[architecture] | settings))
        network = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in network.named_parameters():
            scale = 0.05 if name.endswith("bias") else 0.5 if "norm" in name else 0.25
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        network.get_output_embeddings().weight[END] *= 3
        network.set_attn_implementation(ATTENTION if supports_ragged(config) else "eager")
        return Model(network, byte_tokenizer, ResolvedSource("tiny", "folder", Path()))

    return build
