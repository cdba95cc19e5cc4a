"""Loading a model: the network and the tokenizer from a resolved source, weights mapped from safetensors.

The network is built without memory and filled from the files, so nothing is initialised at random; a file that lacks a
tensor is refused. Code that comes with a model is never run. A folder holds a language model or a reward model, and
says which in its configuration: neither is ever taken for the other.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from luthier.errors import LuthierError, ModelError
from luthier.models.attention import ATTENTION, register_attention, supports_ragged
from luthier.models.quiet import quiet
from luthier.models.sources import ResolvedSource, resolve
from luthier.models.stops import generation_config
from luthier.recipe.training import DType

__all__ = [
    "DTYPES",
    "HEAD",
    "Model",
    "by_layer",
    "config_of",
    "default_device",
    "gives_rewards",
    "load",
    "load_either",
    "network_class",
    "outline",
    "refuse_other_head",
]

DTYPES: dict[DType, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

HEAD = "score"
"""The name of a reward model's head in its network, as nearly all of transformers' classes have it."""


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
    dtype: DType = "fp32",
    device: str | torch.device | None = None,
    attention: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Model:
    """The language model of this name (an alias, a hub id, a folder, a .gguf file), in evaluation mode.

    device: by default `default_device()`.  attention: one of transformers' names; by default Luthier's own.
    Raises ModelError if the model cannot be used, NetworkError if it must be fetched and the network is missing.
    """
    source = resolve(name, environment)
    _refuse_rewards(source)
    return _loaded(source, dtype=dtype, device=device, attention=attention)


def load_either(
    name: str,
    *,
    dtype: DType = "fp32",
    device: str | torch.device | None = None,
    attention: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Model:
    """As `load`, of a language model or a reward model, whichever has this name."""
    return _loaded(resolve(name, environment), dtype=dtype, device=device, attention=attention)


def default_device() -> torch.device:
    """The GPU where torch can use one, else where torch puts new tensors. CUDA_VISIBLE_DEVICES="" hides the GPUs."""
    return torch.device("cuda") if torch.cuda.is_available() else torch.get_default_device()


def outline(
    name: str,
    *,
    dtype: DType = "fp32",
    either: bool = False,
    layers: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Model:
    """The model as `load` gives it, or `load_either`, but without weights: its tensors have shapes and no values.

    layers: how many of its layers it has, the first ones; None for all. tokenizer: its own, where that has been read
    already. To be called, and its network used, within a FakeTensorMode. Raises what loading raises.
    """
    source = resolve(name, environment)
    if not either:
        _refuse_rewards(source)
    with _readable(source):
        config, tokenizer = config_of(source), _tokenizer(source) if tokenizer is None else tokenizer
        if layers is not None:
            _keep_first(config.get_text_config(), layers)
        network = network_class(config).from_config(
            config, dtype=DTYPES[dtype], attn_implementation=_own_attention(config), trust_remote_code=False
        )
        _set_stops(network, tokenizer)
    return Model(network.eval(), tokenizer, source)


def by_layer(config: PretrainedConfig) -> dict[str, list[object]]:
    """What a text configuration says of each layer by itself."""
    return {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list) and len(value) == config.num_hidden_layers
    }


def _keep_first(config: PretrainedConfig, layers: int) -> None:
    """Lets a text configuration describe the first layers alone."""
    for name, value in by_layer(config).items():
        setattr(config, name, value[:layers])
    config.num_hidden_layers = layers


def config_of(source: ResolvedSource) -> PretrainedConfig:
    """The model's configuration, which says what it is. Raises ModelError where it cannot be read."""
    with _readable(source):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            source.folder, local_files_only=True, trust_remote_code=False
        )
    return config


def gives_rewards(config: PretrainedConfig) -> bool:
    """Whether it is the configuration of a reward model, or of any classifier of sequences."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def network_class(config: PretrainedConfig) -> Any:
    """Which family of transformers' classes builds the network: language models or classifiers of sequences."""
    return AutoModelForSequenceClassification if gives_rewards(config) else AutoModelForCausalLM


def refuse_other_head(network: PreTrainedModel, name: str) -> None:
    """Raises ModelError unless the network has one linear head with one output. name: of the model."""
    head = dict(network.named_children()).get(HEAD)
    parameters = {} if head is None else {part: value.shape for part, value in head.named_parameters()}
    if not isinstance(head, nn.Linear) or parameters != {"weight": (1, head.in_features)}:
        raise ModelError(
            f"{name}: a {type(network).__name__} with {network.config.num_labels} labels gives no single reward by a "
            f'linear layer "{HEAD}"; choose another model'
        )


def _refuse_rewards(source: ResolvedSource) -> None:
    config = config_of(source)
    if gives_rewards(config):
        raise ModelError(
            f"{source.name}: is a {config.architectures[0]}, which gives rewards or labels and no text; load it with "
            "load_reward, or give the language model that it was made from"
        )


def _loaded(
    source: ResolvedSource,
    *,
    dtype: DType,
    device: str | torch.device | None,
    attention: str | None,
) -> Model:
    with _readable(source):
        config, tokenizer = config_of(source), _tokenizer(source)
        network = _network(source, config, dtype=DTYPES[dtype], attention=attention or _own_attention(config))
        if gives_rewards(config):
            refuse_other_head(network, source.name)
        _set_stops(network, tokenizer)
    return Model(network.to(default_device() if device is None else device), tokenizer, source)


@contextmanager
def _readable(source: ResolvedSource) -> Iterator[None]:
    """Says in one sentence what the libraries below say in many."""
    with quiet():
        try:
            yield
        except LuthierError:
            raise
        except Exception as error:  # transformers and tokenizers raise whatever a damaged file leads them to
            raise ModelError(f"{source.folder}: cannot be loaded ({_first_line(error)}); fetch it again") from error


def _tokenizer(source: ResolvedSource) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        source.folder, local_files_only=True, trust_remote_code=False
    )
    return tokenizer


def _set_stops(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Where generation stops; a reward model says it too, for it reads what ends there."""
    given = network.generation_config if network.can_generate() else None
    network.generation_config = generation_config(network.config, tokenizer, given)


def _own_attention(config: PretrainedConfig) -> str | None:
    """Luthier's attention, which runs sequences end to end without padding; None where it cannot compute the model."""
    if not supports_ragged(config):
        return None
    register_attention()
    return ATTENTION


def _network(
    source: ResolvedSource, config: PretrainedConfig, *, dtype: torch.dtype, attention: str | None
) -> PreTrainedModel:
    network, report = network_class(config).from_pretrained(
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
            f"{unfilled[0]}; it is damaged or another kind of model"
        )
    if overflown := [name for name, p in network.named_parameters() if p.dtype == torch.float16 and not _is_finite(p)]:
        raise ModelError(
            f"{source.folder}: {overflown[0]} has numbers that fp16 cannot hold; load it with dtype bf16 or fp32"
        )
    return network


def _is_finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
