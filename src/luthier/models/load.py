"""Loading a model: the network and the tokenizer from a resolved source, weights mapped from safetensors.

The network is built without memory and filled from the files, so nothing is initialised at random; a file that lacks a
tensor is refused. Code that comes with a model is never run.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from luthier.errors import ModelError
from luthier.models.attention import ATTENTION, register_attention, supports_ragged
from luthier.models.quiet import quiet
from luthier.models.sources import ResolvedSource, resolve
from luthier.models.stops import generation_config

__all__ = ["DTYPES", "Model", "default_device", "load", "outline"]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(slots=True)
class Model:
    """A network, the tokenizer that belongs to it, and where both came from."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: ResolvedSource

    @property
    def config(self) -> PretrainedConfig:
        """The network's Hugging Face configuration."""
        return self.network.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.network.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        dtype: torch.dtype = self.network.dtype
        return dtype


def load(
    name: str = "smollm2-135m",
    *,
    dtype: Literal["bf16", "fp32"] = "fp32",
    device: str | torch.device | None = None,
    attention: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Model:
    """The model of this name (an alias, a hub id, a folder, a .gguf file), in evaluation mode.

    device: by default `default_device()`.  attention: one of transformers' names; by default Luthier's own.
    Raises ModelError if the model cannot be used, NetworkError if it must be fetched and the network is missing.
    """
    source = resolve(name, environment)
    with _readable(source):
        config, tokenizer = _described(source)
        network = _network(source, config, dtype=DTYPES[dtype], attention=attention or _own_attention(config))
        network.generation_config = generation_config(config, tokenizer, network.generation_config)
    return Model(network.to(default_device() if device is None else device), tokenizer, source)


def default_device() -> torch.device:
    """The GPU where torch can use one, else where torch puts new tensors. CUDA_VISIBLE_DEVICES="" hides the GPUs."""
    return torch.device("cuda") if torch.cuda.is_available() else torch.get_default_device()


def outline(
    name: str, *, dtype: Literal["bf16", "fp32"] = "fp32", environment: Mapping[str, str] = os.environ
) -> Model:
    """The model as `load` gives it, but without weights: its tensors have shapes and no values.

    To be called, and its network used, within a FakeTensorMode. Raises what `load` raises.
    """
    source = resolve(name, environment)
    with _readable(source):
        config, tokenizer = _described(source)
        network = AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[dtype], attn_implementation=_own_attention(config), trust_remote_code=False
        )
        network.generation_config = generation_config(config, tokenizer, network.generation_config)
    return Model(network.eval(), tokenizer, source)


@contextmanager
def _readable(source: ResolvedSource) -> Iterator[None]:
    """Says in one sentence what the libraries below say in many."""
    with quiet():
        try:
            yield
        except (ValueError, OSError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"{source.folder}: cannot be loaded ({_first_line(error)}); fetch it again") from error


def _described(source: ResolvedSource) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    config = AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    return config, AutoTokenizer.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)


def _own_attention(config: PretrainedConfig) -> str | None:
    """Luthier's attention, which runs sequences end to end without padding; None where it cannot compute the model."""
    if not supports_ragged(config):
        return None
    register_attention()
    return ATTENTION


def _network(
    source: ResolvedSource, config: PretrainedConfig, *, dtype: torch.dtype, attention: str | None
) -> PreTrainedModel:
    network, report = AutoModelForCausalLM.from_pretrained(
        source.folder,
        config=config,
        dtype=dtype,
        attn_implementation=attention,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    if unfilled := sorted(report["missing_keys"]):
        raise ModelError(
            f"{source.folder}: its weights lack {len(unfilled)} tensors of a {type(network).__name__}, the first "
            f"{unfilled[0]}; it is damaged or no language model"
        )
    return network


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
