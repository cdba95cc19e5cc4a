"""A model saved in Hugging Face layout: weights, configuration, tokenizer, chat template and where generation stops.

The folder appears whole or not at all. An older model in its place is replaced, but a folder that holds anything that
is not a model's file is refused, so that nothing of the user's is ever deleted.
"""

from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from luthier.adapters.inject import adapted_layers
from luthier.errors import AdapterError, ModelError
from luthier.files import ELSEWHERE, not_written, written_whole
from luthier.models.load import DTYPES, Model
from luthier.models.quiet import quiet
from luthier.models.stops import generation_config
from luthier.recipe.training import DType

__all__ = ["check_replaceable", "rounded", "save", "write_settings"]

_MODEL_FILES = ("*.json", "*.jinja", "*.safetensors", "merges.txt", "tokenizer.model", "vocab.txt")


def save(
    model: Model,
    folder: str | Path,
    *,
    dtype: DType | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Writes the model so that loading it gives equal weights and token ids; tied weights are stored once.

    dtype: of the weights in the file, by default their own.  Returns the folder.
    The network's generation settings are completed on the way, as loading does: they stop at the end of a turn.
    Raises AdapterError if adapters are attached, ModelError if the folder cannot be written or holds other files.
    """
    place = Path(folder).expanduser().absolute()
    if adapted := list(adapted_layers(model.network)):
        raise AdapterError(f"{place}: {adapted[0]} carries an adapter; merge it first, or save the adapter by itself")
    check_replaceable(place)
    try:
        with quiet(), written_whole(place) as beside:
            _write(model, beside, dtype=None if dtype is None else DTYPES[dtype], max_shard_bytes=max_shard_bytes)
    except (OSError, SafetensorError, ValueError) as error:  # ValueError: settings that transformers will not write
        raise ModelError(not_written(place, error, mend=ELSEWHERE)) from error
    return place


def check_replaceable(place: Path) -> None:
    """Raises ModelError unless a model may be written here: nothing is in the place but, perhaps, an older model."""
    if place.exists() and not place.is_dir():
        raise ModelError(f"{place}: is a file; choose another place for the model")
    for file in sorted(place.iterdir()) if place.exists() else ():
        known = any(fnmatchcase(file.name, pattern) for pattern in _MODEL_FILES)
        if file.is_dir() or not known or file.name.startswith("adapter_"):
            raise ModelError(f"{place}: holds {file.name}, which is no part of a model; choose another place")


def _write(model: Model, folder: Path, *, dtype: torch.dtype | None, max_shard_bytes: int) -> None:
    network = model.network
    network.generation_config = generation_config(network.config, model.tokenizer, network.generation_config)
    state = None if dtype is None else _converted(network.state_dict(), dtype)
    network.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_bytes)
    for file in folder.glob("*.safetensors"):
        file.chmod((folder / "config.json").stat().st_mode)  # safetensors would let only the owner read
    write_settings(folder, network.config, network.generation_config, model.tokenizer, dtype=dtype)


def write_settings(
    folder: Path,
    config: PretrainedConfig,
    generation: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """All of a model but its weights, whose type is `dtype` or what `config` says. config.json, by which a folder
    counts as a model, is written last.
    """
    tokenizer.save_pretrained(folder)
    generation.save_pretrained(folder)
    if dtype is not None:
        config = type(config).from_dict(config.to_dict() | {"dtype": dtype})
    config.save_pretrained(folder)


def rounded(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor in this type. Raises ModelError where its numbers are too great for float16."""
    result = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype and not torch.equal(result.isfinite(), tensor.isfinite()):
        raise ModelError(f"{name} has numbers that fp16 cannot hold; choose dtype bf16 or fp32")
    return result


def _converted(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Every floating tensor in this type; tensors that share memory still do, so that they are stored once."""
    converted = {
        tensor.data_ptr(): rounded(tensor, dtype, name) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }
    return {name: converted[tensor.data_ptr()] for name, tensor in state.items()}
