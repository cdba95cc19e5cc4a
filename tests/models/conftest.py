"""Tiny real models: a few layers from a configuration and a seed, with a byte tokenizer that has a ChatML template."""

import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from luthier.models.load import DTYPES, Model
from luthier.models.save import save
from luthier.models.sources import ResolvedSource

Factory = Callable[..., PreTrainedModel]

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """This process's environment with a cache of its own."""
    return {**os.environ, "LUTHIER_CACHE": str(tmp_path / "cache")}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", chat_template=TEMPLATE)


@pytest.fixture
def network() -> Factory:
    def build(architecture: str = "llama", *, seed: int = 0, **settings: object) -> PreTrainedModel:
        """Random weights everywhere, norms and biases included, so that none can be lost or exchanged unseen."""
        ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        sizes = {"vocab_size": 288, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
        config = AutoConfig.for_model(architecture, **(ends | sizes | heads | settings))
        built = AutoModelForCausalLM.from_config(config).eval()
        generator = torch.Generator().manual_seed(seed)
        for parameter in built.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        return built

    return build


@pytest.fixture
def model(network: Factory, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Model:
    return Model(network(tie_word_embeddings=True), tokenizer, ResolvedSource("tiny", "folder", tmp_path))


@pytest.fixture
def full_disk() -> Iterator[Callable[[], None]]:
    """Called, no file may grow over 10,000 bytes until the test ends."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def base(model: Model, network: Factory, tmp_path: Path) -> Callable[..., Path]:
    """Saves a tiny model of an architecture and gives its folder."""

    def saved(architecture: str = "llama", *, dtype: str = "fp32", shard: int = 10**9, **settings: object) -> Path:
        model.network = network(architecture, **settings).to(DTYPES[dtype])
        return save(model, tmp_path / "base", max_shard_bytes=shard)

    return saved
