"""Adapters in PEFT's layout: `adapter_config.json` beside `adapter_model.safetensors`, written and read.

Parameters keep their own names, under `base_model.model.` and the module's dotted name, as PEFT writes them. Tensors
stay on the disk until a module asks for its own, so that a merge needs no more memory than one layer.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn

from luthier.adapters.base import Adapter
from luthier.adapters.dylora import rank_to_serve, serve_at, served_rank
from luthier.adapters.inject import ADAPTERS, DEFAULT_NAME, adapted_layers, attach, build, share
from luthier.adapters.new_tokens import token_words
from luthier.adapters.peft_config import settings_of_config, words_of_config
from luthier.adapters.peft_files import CONFIG, OWN_FIELD, WEIGHTS, opened, read_config, refuse_damaged, write_adapter
from luthier.adapters.targets import Linear, named_places
from luthier.errors import AdapterError
from luthier.recipe.adapters import AnyAdapter
from luthier.recipe.training import DType

__all__ = ["SavedAdapter", "load_adapter", "read_adapter", "save_adapter"]

_BASE_HASH, _BASE_TYPE, _QUANTIZED = "base_sha256", "base_dtype", "quantize_base"  # in the weights' metadata
_RANK = "served_rank"


def save_adapter(
    network: nn.Module,
    folder: Path,
    *,
    base_model: str,
    base_sha256: str | None = None,
    quantize_base: str | None = None,
    base_dtype: str = "fp32",
    name: str = DEFAULT_NAME,
) -> None:
    """Writes one adapter of the network, in float32.

    base_model, base_sha256: the model it was trained on and the hash of its weights, by which a merge knows the base.
    quantize_base: how that base was quantized, from weights in base_dtype.
    Raises AdapterError if the network has no adapter of this name, or the folder cannot be written.
    """
    adapters = _named(network, name)
    settings: AnyAdapter = adapters[0].settings
    tensors = {key: value.to("cpu").contiguous() for a in adapters for key, value in a.saved().items()}
    known = {_BASE_HASH: base_sha256, _BASE_TYPE: quantize_base and base_dtype, _QUANTIZED: quantize_base}
    metadata = {word: value for word, value in known.items() if value}
    if rank := served_rank(adapters):
        metadata[_RANK] = str(rank)
    extra = {**ADAPTERS[settings.type].peft_words(settings, adapters), **token_words(adapters)}
    config = words_of_config(settings, base_model, extra)
    if "target_modules" in config and config["target_modules"] is not None:
        config["target_modules"] = _short_names(network, [a for a in adapters if type(a) is ADAPTERS[settings.type]])
    if OWN_FIELD not in config:
        metadata[OWN_FIELD] = settings.model_dump_json()
    write_adapter(folder, tensors, config, metadata)


def _named(network: nn.Module, name: str) -> list[Adapter]:
    layers = adapted_layers(network).values()
    found: list[Adapter] = [layer.adapters[name] for layer in layers if name in layer.adapters]
    if not found:
        raise AdapterError(f'the model carries no adapter named "{name}"')
    return sorted(found, key=lambda adapter: type(adapter) is not ADAPTERS[adapter.settings.type])  # the type's first


def _short_names(network: nn.Module, adapters: list[Adapter]) -> list[str]:
    """The shortest list that means these layers and no others: last names if they suffice, else whole names."""
    chosen = {adapter.name for adapter in adapters}
    short = {path.rpartition(".")[2] for path in chosen}
    linear = {path for path, place in named_places(network) if isinstance(place, Linear)}
    meant = {path for path in linear if path.rpartition(".")[2] in short}
    return sorted(short if meant == chosen else chosen)


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """An adapter in a folder, its settings read and its tensors not yet.

    base_model: the model it was trained on, as it was named then; base_sha256: the hash of that model's weights;
    quantize_base: how these were quantized, None where they were not, from weights in base_dtype. The first two are
    None where the adapter does not say. rank: the one to serve at, of a type that has several.
    """

    folder: Path
    settings: AnyAdapter
    base_model: str | None = None
    base_sha256: str | None = None
    quantize_base: str | None = None
    base_dtype: DType = "fp32"
    rank: int | None = None

    def build(self, network: nn.Module) -> list[Adapter]:
        """The adapters for this network, on no module yet and without values. Raises AdapterError unless the files
        hold exactly their tensors.
        """
        with opened(self.folder / WEIGHTS) as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in sorted(file.keys())}
        adapters = build(network, self.settings)
        serve_at(adapters, self.rank)
        for adapter in adapters:
            adapter.fit(shapes)
        expected = {key: tuple(value.shape) for a in adapters for key, value in a.saved().items()}
        optional = {key for adapter in adapters for key in adapter.optional_keys}
        found = {key: shape for key, shape in shapes.items() if key not in optional}
        if different := sorted(expected.keys() ^ found.keys()):
            raise AdapterError(
                f"{self.folder}: made for another model: {len(different)} tensors differ, the first {different[0]}"
            )
        for key, shape in expected.items():
            if shape != found[key]:
                raise AdapterError(f"{self.folder}: made for another model: {key} is {found[key]}, here {shape}")
        return adapters

    def fill(self, adapters: list[Adapter], network: nn.Module) -> None:
        """Copies the saved tensors into adapters that were built for this network."""
        with opened(self.folder / WEIGHTS) as file:
            tensors = _Tensors(file)
            share(adapters, network, tensors)
            for adapter in adapters:
                adapter.fill(tensors)

    def on(self, outline: Adapter, place: nn.Module, network: nn.Module) -> Adapter:
        """An adapter that was built for this network, made again for a module with values, its tensors in it."""
        adapter = type(outline)(place, self.settings, name=outline.name, config=outline.config)
        serve_at([adapter], self.rank)
        self.fill([adapter], network)
        return adapter

    def metadata(self) -> dict[str, str]:
        """What the file of weights says of the base."""
        with opened(self.folder / WEIGHTS) as file:
            said: dict[str, str] = file.metadata() or {}
        return {name: said[name] for name in (_BASE_HASH, _BASE_TYPE, _QUANTIZED) if name in said}

    def tensors(self) -> dict[str, Tensor]:
        """All that is saved, by key."""
        with opened(self.folder / WEIGHTS) as file:
            return {key: file.get_tensor(key) for key in sorted(file.keys())}


class _Tensors(Mapping[str, Tensor]):
    """The tensors of an open file, each read when it is asked for."""

    def __init__(self, file: Any) -> None:
        self._file, self._keys = file, frozenset(file.keys())

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        tensor: Tensor = self._file.get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def read_adapter(folder: Path, *, rank: int | None = None) -> SavedAdapter:
    """What the folder says of its adapter. rank: the one to serve at, of a type that has several.

    Raises AdapterError where it holds no adapter, a damaged one, or one that this package cannot represent, and for a
    rank that the adapter does not have.
    """
    config = read_config(folder)
    refuse_damaged(folder / WEIGHTS)
    with opened(folder / WEIGHTS) as file:
        said: dict[str, str] = file.metadata() or {}
    own = _own(folder / WEIGHTS, said)
    settings = settings_of_config(folder / CONFIG, config, own)
    return SavedAdapter(
        folder,
        settings,
        base_model=config.get("base_model_name_or_path"),
        base_sha256=said.get(_BASE_HASH),
        quantize_base=said.get(_QUANTIZED),
        base_dtype=next((word for word in get_args(DType) if word == said.get(_BASE_TYPE)), "fp32"),
        rank=rank_to_serve(settings, rank, said.get(_RANK)),
    )


def load_adapter(network: nn.Module, folder: Path, *, name: str = DEFAULT_NAME, rank: int | None = None) -> AnyAdapter:
    """Puts a saved adapter on the network and makes it active; returns its settings. rank: as for `read_adapter`.

    Raises AdapterError where the folder holds no adapter, one that this package cannot represent, or one for another
    model, and for a rank that the adapter does not have; the network is then left as it was.
    """
    saved = read_adapter(folder, rank=rank)
    adapters = saved.build(network)
    saved.fill(adapters, network)
    attach(network, adapters, name)
    return saved.settings


def _own(path: Path, said: Mapping[str, str]) -> dict[str, Any] | None:
    """Our own settings in the metadata of a file of weights. Raises AdapterError where they are damaged."""
    try:
        own = json.loads(said.get(OWN_FIELD, "null"))
    except ValueError:
        own = ""
    if own is not None and not isinstance(own, dict):
        raise AdapterError(f"{path}: its settings are damaged; copy it again")
    return own
