"""Adapters in PEFT's layout: `adapter_config.json` beside `adapter_model.safetensors`, written and read.

Parameters keep their own names, under `base_model.model.` and the layer's dotted name, as PEFT writes them. What a
file asks for and this package does not have is refused by name, because an adapter that is read in part is another
adapter.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from luthier.adapters.base import Adapter
from luthier.adapters.inject import DEFAULT_NAME, adapted_layers, inject
from luthier.errors import AdapterError
from luthier.recipe.adapters import LoRA

__all__ = ["load_adapter", "save_adapter"]

_CONFIG, _WEIGHTS, _PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."

_MUST_BE_UNSET = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "layer_replication",
    "layers_to_transform",
    "lora_bias",
    "megatron_config",
    "modules_to_save",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
)


def save_adapter(network: nn.Module, folder: Path, *, base_model: str, name: str = DEFAULT_NAME) -> None:
    """Writes one adapter of the network, in float32. Raises AdapterError if the network has none of this name."""
    chosen = _named(network, name)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{_PREFIX}{path}.{key}.weight": value.detach().to("cpu").contiguous()
        for path, adapter in chosen.items()
        for key, value in adapter.state_dict().items()
    }
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    settings = next(iter(chosen.values())).settings
    config = _config(settings, _short_names(network, chosen), base_model)
    (folder / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_adapter(network: nn.Module, folder: Path, *, name: str = DEFAULT_NAME) -> LoRA:
    """Puts a saved adapter on the network and makes it active; returns its settings.

    Raises AdapterError where the folder holds no adapter, one that this package cannot represent, or one for another
    model.
    """
    settings, tensors = _settings(folder), _tensors(folder)
    inject(network, settings, seed=0, name=name)
    expected = {
        f"{_PREFIX}{path}.{key}.weight": value
        for path, adapter in _named(network, name).items()
        for key, value in adapter.state_dict().items()
    }
    _refuse_mismatch(folder, expected, tensors)
    with torch.no_grad():
        for key, value in expected.items():
            value.copy_(tensors[key])
    return settings


def _named(network: nn.Module, name: str) -> dict[str, Adapter]:
    layers = {path: layer.adapters for path, layer in adapted_layers(network).items() if name in layer.adapters}
    if not layers:
        raise AdapterError(f'the model carries no adapter named "{name}"')
    chosen = {path: adapters[name] for path, adapters in layers.items()}
    return {path: adapter for path, adapter in chosen.items() if isinstance(adapter, Adapter)}


def _short_names(network: nn.Module, chosen: dict[str, Adapter]) -> list[str]:
    """The shortest list that means these layers and no others: last names if they suffice, else whole names."""
    short = {path.rpartition(".")[2] for path in chosen}
    linear = {n for n, m in network.named_modules() if isinstance(m, nn.Linear) and not n.endswith(".base")}
    meant = {n for n in linear | set(chosen) if n.rpartition(".")[2] in short}
    return sorted(short if meant == set(chosen) else chosen)


def _config(settings: LoRA, names: list[str], base_model: str) -> dict[str, Any]:
    return {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": "gaussian" if settings.init == "gaussian" else True,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "peft_type": "LORA",
        "r": settings.r,
        "target_modules": names,
        "task_type": "CAUSAL_LM",
        "use_rslora": settings.rs_scaling,
    }


def _settings(folder: Path) -> LoRA:
    try:
        config = json.loads((folder / _CONFIG).read_text())
    except FileNotFoundError:
        raise AdapterError(f"{folder}: no adapter here ({_CONFIG} is missing); give the folder that holds it") from None
    except ValueError as error:
        raise AdapterError(f"{folder / _CONFIG}: not JSON ({error}); save the adapter again") from None
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder}: adapters of type {config.get('peft_type')} cannot be read; only LORA can")
    asked = [key for key in _MUST_BE_UNSET if config.get(key)]
    asked += ["bias"] if config.get("bias", "none") != "none" else []
    if asked:
        raise AdapterError(f"{folder}: asks for {', '.join(asked)}, which cannot be read; merge it with PEFT first")
    names = config["target_modules"]
    return LoRA(
        r=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        target_modules=names if names == "all-linear" else tuple(names),
        rs_scaling=config.get("use_rslora", False),
    )


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / _WEIGHTS
    if not path.exists():
        raise AdapterError(
            f"{folder}: {_WEIGHTS} is missing; pickled adapters (.bin) are never loaded, save it as safetensors"
        )
    try:
        tensors: dict[str, Tensor] = load_file(path)
        return tensors
    except SafetensorError as error:
        raise AdapterError(f"{path}: damaged or cut short ({error}); copy it again") from None


def _refuse_mismatch(folder: Path, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    if different := sorted(expected.keys() ^ found.keys()):
        raise AdapterError(
            f"{folder}: made for another model: {len(different)} layers differ, the first {different[0]}"
        )
    for key, value in expected.items():
        if value.shape != found[key].shape:
            raise AdapterError(
                f"{folder}: made for another model: {key} is {tuple(found[key].shape)}, here {tuple(value.shape)}"
            )
