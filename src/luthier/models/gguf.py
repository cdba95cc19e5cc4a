"""A GGUF file becomes a Hugging Face folder: dequantized, renamed, and the tokenizer with it.

Weights stream from file to file, one tensor at a time; what the file keeps in 16 bits stays so, all else becomes fp32.
The finished names and shapes must be exactly those of the architecture, so nothing is left out or left random.
Architectures without a row in the table are left to transformers' own, slower loader, which needs the model in memory.
"""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from luthier.errors import ModelError
from luthier.models.gguf_architectures import ARCHITECTURES, Architecture
from luthier.models.gguf_header import Header, read_gguf
from luthier.models.gguf_tokenizer import tokenizer_of
from luthier.models.quiet import quiet
from luthier.models.stops import generation_config
from luthier.models.weights import LazyTensor, write_safetensors

__all__ = ["convert_gguf"]

_SPECIAL_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def convert_gguf(file: Path, folder: Path) -> None:
    """Writes the model in `file` into `folder` in Hugging Face layout: weights, configuration, tokenizer, template.

    Raises ModelError if the file is damaged, or holds what cannot be converted faithfully.
    """
    header, tensors = read_gguf(file)
    with quiet():
        if header.architecture in ARCHITECTURES:
            _convert(header, tensors, folder)
        else:
            _convert_with_transformers(header, folder)


def _convert(header: Header, tensors: dict[str, LazyTensor], folder: Path) -> None:
    architecture = ARCHITECTURES[header.architecture]
    config = _config(header, architecture, tensors)
    converted = architecture.tensors(header, tensors)
    _check_complete(header, config, converted)
    tokenizer = tokenizer_of(header)
    write_safetensors(folder / "model.safetensors", converted)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generation_config(config, tokenizer).save_pretrained(folder)


def _config(header: Header, architecture: Architecture, tensors: dict[str, LazyTensor]) -> PretrainedConfig:
    ids = {field: header.values.get(f"tokenizer.ggml.{key}_token_id") for field, key in _SPECIAL_IDS.items()}
    settings = architecture.settings(header, tensors)
    return AutoConfig.for_model(architecture.model_type, **settings, **ids, dtype="float32")


def _check_complete(header: Header, config: PretrainedConfig, converted: list[LazyTensor]) -> None:
    """The architecture itself, built without memory, says which tensors it needs."""
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(network).__name__]
    needed = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if config.tie_word_embeddings:
        del needed["lm_head.weight"]
    found = {tensor.name: tensor.shape for tensor in converted}
    if wrong := sorted(dict(needed.items() ^ found.items())):
        raise ModelError(
            f"{header.file}: {len(wrong)} tensors are missing, unexpected or of the wrong shape, the first {wrong[0]}; "
            "fetch the file again or use the model's safetensors folder"
        )


def _convert_with_transformers(header: Header, folder: Path) -> None:
    place, name = header.file.parent, header.file.name
    try:
        network = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise ModelError(
            f"{header.file}: the architecture {header.architecture} cannot be read ({error}); known are "
            f"{', '.join(ARCHITECTURES)} and what the installed transformers knows"
        ) from error
    _check_rotary_base(header, network.config)
    vars(network.config).pop("quantization_config", None)  # dequantized as it is, transformers would not save it
    network.hf_quantizer = None
    network.quantization_method = None
    tokenizer = tokenizer_of(header)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generation_config(network.config, tokenizer).save_pretrained(folder)


def _check_rotary_base(header: Header, config: PretrainedConfig) -> None:
    """Some of transformers' conversions leave it at the default, and the model would go wrong without a word."""
    stored = header.setting("rope.freq_base")
    read = (config.rope_parameters or {}).get("rope_theta") if "rope_parameters" in vars(config) else None
    if stored is not None and read != stored:
        raise ModelError(
            f"{header.file}: the installed transformers reads the rotary base of {header.architecture} as {read} where "
            f"the file says {stored}; use the model's safetensors folder instead"
        )
