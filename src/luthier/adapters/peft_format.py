"""Adapters in PEFT's layout: `adapter_config.json` beside `adapter_model.safetensors`, written and read.

Parameters keep their own names, under `base_model.model.` and the layer's dotted name, as PEFT writes them. What a
file asks for and this package does not have is refused by name, because an adapter that is read in part is another
adapter. Tensors stay on the disk until a layer asks for its own, so that a merge needs no more memory than one layer.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import nn

from luthier.adapters.base import Adapter
from luthier.adapters.inject import ADAPTERS, DEFAULT_NAME, adapted_layers, inject, targets
from luthier.errors import AdapterError, RecipeError
from luthier.recipe.adapters import AdapterSettings, LoRA

__all__ = ["SavedAdapter", "load_adapter", "read_adapter", "save_adapter"]

_CONFIG, _WEIGHTS, _PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
_BASE_HASH = "base_sha256"  # in the weights' metadata: PEFT warns of unknown words in the configuration

_MUST_BE_UNSET = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "exclude_modules",
    "fan_in_fan_out",
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


def save_adapter(
    network: nn.Module, folder: Path, *, base_model: str, base_sha256: str | None = None, name: str = DEFAULT_NAME
) -> None:
    """Writes one adapter of the network, in float32.

    base_model, base_sha256: the model it was trained on and the hash of its weights, by which a merge knows the base.
    Raises AdapterError if the network has no adapter of this name, or the folder cannot be written.
    """
    chosen = _named(network, name)
    tensors = {
        _key(path, key): value.detach().to("cpu").contiguous()
        for path, adapter in chosen.items()
        for key, value in adapter.state_dict().items()
    }
    metadata = {"format": "pt"} | ({_BASE_HASH: base_sha256} if base_sha256 else {})
    config = _config(next(iter(chosen.values())).settings, _short_names(network, chosen), base_model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _WEIGHTS).write_bytes(_sorted_header(serialize(tensors, metadata)))
        (folder / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{folder}: cannot be written ({error}); make room or choose another place") from error


def _sorted_header(data: bytes) -> bytes:
    """The same safetensors file with the words of its header in order: safetensors itself writes them in any."""
    start = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps(json.loads(data[8:start]), sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[start:]


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """An adapter in a folder, its settings read and its tensors not yet.

    base_model: the model it was trained on, as it was named then; base_sha256: the hash of that model's weights. Both
    are None where the adapter does not say.
    """

    folder: Path
    settings: AdapterSettings
    base_model: str | None = None
    base_sha256: str | None = None

    def check(self, network: nn.Module) -> None:
        """Raises AdapterError unless the files hold exactly the tensors of this adapter on this network."""
        expected = self._expected_shapes(network)
        with _opened(self.folder / _WEIGHTS) as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in sorted(file.keys())}
        if different := sorted(expected.keys() ^ found.keys()):
            raise AdapterError(
                f"{self.folder}: made for another model: {len(different)} tensors differ, the first {different[0]}"
            )
        for key, shape in expected.items():
            if shape != found[key]:
                raise AdapterError(f"{self.folder}: made for another model: {key} is {found[key]}, here {shape}")

    def _expected_shapes(self, network: nn.Module) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for path, linear in targets(network, self.settings.target_modules).items():
            bare = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
            adapter = ADAPTERS[self.settings.type](bare, self.settings, name=path)
            shapes |= {_key(path, name): tuple(value.shape) for name, value in adapter.state_dict().items()}
        return shapes

    def on(self, linear: nn.Linear, path: str) -> Adapter:
        """The adapter of one layer, by its dotted name, with the saved tensors in it."""
        adapter = ADAPTERS[self.settings.type](linear, self.settings, name=path)
        self.fill(adapter)
        return adapter

    def fill(self, adapter: Adapter) -> None:
        """Copies the saved tensors of the adapter's layer into it."""
        with _opened(self.folder / _WEIGHTS) as file, torch.no_grad():
            for name, value in adapter.state_dict().items():
                value.copy_(file.get_tensor(_key(adapter.name, name)))


def read_adapter(folder: Path) -> SavedAdapter:
    """What the folder says of its adapter.

    Raises AdapterError where it holds no adapter, a damaged one, or one that this package cannot represent.
    """
    config = _read_config(folder)
    with _opened(folder / _WEIGHTS) as file:
        metadata: dict[str, str] = file.metadata() or {}
    return SavedAdapter(
        folder, _settings(folder, config), config.get("base_model_name_or_path"), metadata.get(_BASE_HASH)
    )


def load_adapter(network: nn.Module, folder: Path, *, name: str = DEFAULT_NAME) -> AdapterSettings:
    """Puts a saved adapter on the network and makes it active; returns its settings.

    Raises AdapterError where the folder holds no adapter, one that this package cannot represent, or one for another
    model; the network is then left as it was.
    """
    saved = read_adapter(folder)
    saved.check(network)
    for adapter in inject(network, saved.settings, seed=0, name=name):
        saved.fill(adapter)
    return saved.settings


def _key(path: str, name: str) -> str:
    return f"{_PREFIX}{path}.{name}.weight"


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


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{folder}: no adapter here ({_CONFIG} is missing); give the folder that holds it") from None
    except ValueError as error:
        raise AdapterError(f"{folder / _CONFIG}: not JSON ({error}); save the adapter again") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{folder / _CONFIG}: not a JSON object; save the adapter again")
    return config


def _settings(folder: Path, config: dict[str, Any]) -> AdapterSettings:
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder}: adapters of type {config.get('peft_type')} cannot be read; only LORA can")
    asked = [key for key in _MUST_BE_UNSET if config.get(key)]
    asked += ["bias"] if config.get("bias", "none") != "none" else []
    names = config.get("target_modules")
    asked += ["target_modules as a pattern"] if isinstance(names, str) and names != "all-linear" else []
    if asked:
        raise AdapterError(f"{folder}: asks for {', '.join(asked)}, which cannot be read; merge it with PEFT first")
    try:
        return LoRA(
            r=config["r"],
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout", 0.0),
            target_modules="all-linear" if isinstance(names, str) else tuple(config["target_modules"]),
            rs_scaling=config.get("use_rslora", False),
        )
    except (KeyError, TypeError, RecipeError) as error:
        raise AdapterError(f"{folder / _CONFIG}: not a LoRA's settings ({error}); save the adapter again") from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.exists():
        raise AdapterError(
            f"{path.parent}: {path.name} is missing; pickled adapters (.bin) are never loaded, save it as safetensors"
        )
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: damaged or cut short ({error}); copy it again") from None
