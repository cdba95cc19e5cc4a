"""An adapter merged into a model's stored weights, tensor by tensor; the model is never loaded.

Its architecture, built without memory, says which layers there are, and transformers' own renaming under which name a
file holds each. A layer that the adapter changes is merged when its turn to be written comes, and every other tensor is
copied. Nothing here knows what kind of adapter it is, only that `Adapter.merge` takes a weight and a bias. An adapter
that was trained with a head makes a language model a reward model: its output layer is left out, its head is added.
"""

import logging
import math
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from luthier.adapters.base import Adapter
from luthier.adapters.merge import refuse_new_bias
from luthier.adapters.new_tokens import knowing
from luthier.adapters.peft_format import SavedAdapter, read_adapter
from luthier.adapters.targets import linear_targets
from luthier.errors import ModelError
from luthier.files import ELSEWHERE, free_bytes, in_words, not_written, written_whole
from luthier.models.adapted import refuse_wrong_base, tokenizer_of
from luthier.models.certificate import Certificate, certify, fits_in_memory
from luthier.models.heads import head_outline, padded_for, trains_head
from luthier.models.load import DTYPES, HEAD, config_of, gives_rewards, network_class
from luthier.models.quiet import quiet
from luthier.models.save import check_replaceable, rounded, write_settings
from luthier.models.sources import ResolvedSource
from luthier.models.stops import generation_config
from luthier.models.weights import LazyTensor, read_weights, write_weights
from luthier.quant.linear import round_trip
from luthier.recipe.training import DType

__all__ = ["Merged", "merge_into"]

logger = logging.getLogger(__name__)

_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_HALVES = ("BF16", "F16")

Files = dict[str, list[LazyTensor]]


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge wrote: the model's folder, how many layers the adapter changed, and its certificate if asked for."""

    folder: Path
    num_layers: int
    certificate: Certificate | None = None


@dataclass(frozen=True, slots=True)
class _Layer:
    """A linear layer of the stored model that the adapter changes; `name` is dotted, as the network has it."""

    adapter: Adapter
    weight: LazyTensor
    bias: LazyTensor | None


def merge_into(
    source: ResolvedSource,
    adapter: Path,
    destination: str | Path,
    *,
    dtype: DType | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    verify: bool = False,
    rank: int | None = None,
) -> Merged:
    """Writes source and adapter as one ordinary model, whole or not at all; peak memory is that of one layer's merge.
    An adapter with a head gives a reward model in the form of transformers' sequence classification.

    dtype: of the weights in the file, by default each tensor's own.  tokenizer: by default the one beside the adapter,
    or else the source's; it gets the adapter's new tokens.
    verify: loads the result again and compares it with base and adapter; this needs the whole model in memory and is
    left out, with a warning, where that does not fit. rank: the one to merge at, of an adapter that has several.
    Raises AdapterError if the adapter was made for another model or cannot be merged, ModelError if the model cannot
    be read or written, ExportError if the result is not base and adapter.
    """
    place = Path(destination).expanduser().absolute()
    saved = read_adapter(adapter, rank=rank)
    config = config_of(source)
    new_head = trains_head(saved.settings) and not gives_rewards(config)
    network = _skeleton(source, config, new_head=new_head)
    adapters = saved.build(network)
    refuse_wrong_base(saved, source)
    _refuse_place(place, source, adapter)
    stored = read_weights(source.folder)
    if new_head:
        stored = _headed(stored, network)
    names = _stored_names(network, stored)
    layers = _layers(source, adapters, stored, names)
    wanted = None if dtype is None else _word(DTYPES[dtype])
    _count_rows(network, adapters)
    files = _merged(stored, layers, _Merging(saved, network, wanted, _quantized(network, saved, names)))
    _check_room(place, files)
    try:
        with quiet(), written_whole(place) as beside:
            write_weights(beside, files)
            _write_settings(beside, source, network, _tokenizer(source, saved, tokenizer, network), dtype)
            certificate = _certificate(source, saved, beside, files) if verify else None
    except (OSError, ValueError) as error:  # ValueError: settings that transformers will not write
        raise ModelError(not_written(place, error, wanted=_bytes_of(files), mend=ELSEWHERE)) from error
    return Merged(place, len(layers), certificate)


def _skeleton(source: ResolvedSource, config: PretrainedConfig, *, new_head: bool) -> PreTrainedModel:
    """The network without memory. new_head: of the reward model that a language model becomes."""
    try:
        with quiet(), torch.device("meta"):
            network: PreTrainedModel = (
                head_outline(config, source.name) if new_head else network_class(config).from_config(config)
            )
    except (ValueError, OSError, RuntimeError) as error:
        raise ModelError(f"{source.folder}: its architecture cannot be built ({error}); fetch it again") from error
    if "quantization_config" in config.to_dict():
        raise ModelError(f"{source.folder}: is stored quantized; merge into the model that it was made from")
    return network


def _headed(stored: Files, network: PreTrainedModel) -> Files:
    """A language model's tensors without what a reward model does not have, and a head of zeros, which the adapter's
    replaces as the layers are merged; its type is the widest of the files.
    """
    tensors = network.state_dict()
    dropped = {place for name, place in _stored_names(network, stored).items() if name not in tensors}
    kept = {file: [one for one in parts if one.name not in dropped] for file, parts in stored.items()}
    types = (_FLOATS[one.dtype] for parts in kept.values() for one in parts if one.dtype in _FLOATS)
    dtype, shape = reduce(torch.promote_types, types), tuple(network.get_submodule(HEAD).weight.shape)
    name = f"{HEAD}.weight"
    kept[max(kept)].append(LazyTensor(name, _word(dtype), shape, lambda: _bytes(torch.zeros(shape, dtype=dtype))))
    return {file: parts for file, parts in kept.items() if parts}


def _refuse_place(place: Path, source: ResolvedSource, adapter: Path) -> None:
    if place.resolve() in (source.folder.resolve(), adapter.resolve()):
        raise ModelError(f"{place}: is what the merge is made from; choose another place")
    check_replaceable(place)


def _quantized(network: PreTrainedModel, saved: SavedAdapter, names: Mapping[str, str]) -> frozenset[str]:
    """The stored names of the weights that were quantized when the adapter was trained."""
    linears = linear_targets(network, "all-linear") if saved.quantize_base else {}
    return frozenset(names[f"{path}.weight"] for path in linears if f"{path}.weight" in names)


def _layers(source: ResolvedSource, adapters: list[Adapter], stored: Files, names: Mapping[str, str]) -> list[_Layer]:
    by_name = {tensor.name: tensor for tensors in stored.values() for tensor in tensors}
    places = {name: by_name[place] for name, place in names.items()}
    layers, owners = [], dict[frozenset[str], Adapter]()
    for adapter in adapters:
        keys = frozenset(adapter.saved())
        owner = owners.setdefault(keys, adapter)  # of tied layers, the one whose tensors are saved
        if not keys or (owner is not adapter and f"{adapter.name}.weight" not in places):
            continue
        own = dict(adapter.place.named_parameters(recurse=False))
        for part, expected in own.items():
            found = places.get(f"{adapter.name}.{part}")
            if found is None or found.shape != tuple(expected.shape) or found.dtype not in _FLOATS:
                is_there = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
                raise ModelError(
                    f"{source.folder}: {adapter.name}.{part} shall be merged and is {is_there} in its files, not "
                    f"floats of {list(expected.shape)}; they are damaged, or keep it in a form that cannot be merged"
                )
        if "weight" not in own:
            adapter.merge(torch.empty(0), None)  # says that it cannot be merged
        layers.append(_Layer(owner, places[f"{adapter.name}.weight"], places.get(f"{adapter.name}.bias")))
    return layers


def _count_rows(network: PreTrainedModel, adapters: list[Adapter]) -> None:
    """The vocabulary in the configuration is that of the merged embedding."""
    embedding = network.get_input_embeddings()
    for adapter in adapters:
        if adapter.place is embedding:
            network.config.get_text_config().vocab_size = adapter.merged_shape(tuple(embedding.weight.shape))[0]


def _stored_names(network: PreTrainedModel, stored: Files) -> dict[str, str]:
    """Under which name the files hold a tensor of the network, for all that loading takes over unchanged."""
    transforms = get_model_conversion_mapping(network)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    tensors, names = network.state_dict(), {}
    for name in (tensor.name for parts in stored.values() for tensor in parts):
        renamed, converter = rename_source_key(name, renamings, converters, network.base_model_prefix, tensors)
        if converter is None:
            names[renamed] = name
    return names


def _merged(stored: Files, layers: list[_Layer], merging: "_Merging") -> Files:
    """The files of the merged model, in the cut of the stored one."""
    owners = {part.name: layer for layer in layers for part in (layer.weight, layer.bias) if part is not None}
    return {file: [merging.rewritten(t, owners.get(t.name)) for t in tensors] for file, tensors in stored.items()}


@dataclass(frozen=True, slots=True)
class _Merging:
    """How the tensors of a stored model are rewritten.

    network: the model without memory. wanted: the word of the type in the file; None leaves each tensor's. quantized:
    the stored tensors that the adapter saw quantized; they are taken as it saw them.
    """

    saved: SavedAdapter
    network: PreTrainedModel
    wanted: str | None
    quantized: frozenset[str]

    def rewritten(self, tensor: LazyTensor, layer: _Layer | None) -> LazyTensor:
        """The tensor as the merged model's file has it; nothing is read yet."""
        dtype = self.wanted if self.wanted is not None and tensor.dtype in _FLOATS else tensor.dtype
        if layer is None and dtype == tensor.dtype and tensor.name not in self.quantized:
            return tensor
        values = partial(self._values, tensor, dtype) if layer is None else partial(self._merge, layer, tensor, dtype)
        shape = tensor.shape if layer is None else layer.adapter.merged_shape(tensor.shape)
        return LazyTensor(tensor.name, dtype, shape, lambda: _bytes(rounded(values(), _FLOATS[dtype], tensor.name)))

    def _merge(self, layer: _Layer, part: LazyTensor, dtype: str) -> Tensor:
        """A layer's weight or bias with the adapter in it; a bias costs a second merge, and no memory in between."""
        weight = _values(layer.weight, dtype)
        bias = None if layer.bias is None else _values(layer.bias, dtype)
        with torch.no_grad():
            adapter = self.saved.on(layer.adapter, _place(layer.adapter.place, weight, bias), self.network)
            merged_weight, merged_bias = adapter.merge(self._values(layer.weight, dtype, adapter), bias)
        refuse_new_bias(adapter.name, bias, merged_bias)
        if part is layer.weight:
            return merged_weight
        assert merged_bias is not None
        return merged_bias

    def _values(self, tensor: LazyTensor, dtype: str, adapter: Adapter | None = None) -> Tensor:
        values = _values(tensor, dtype)
        if tensor.name not in self.quantized:
            return values
        seen = values.to(DTYPES[self.saved.base_dtype])
        dense = seen if adapter is None else adapter.strip(seen)
        return round_trip(dense, str(self.saved.quantize_base)).to(values.dtype)


def _place(outline: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A module as `outline`, which has no memory, with these values."""
    place = copy(outline)
    place._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    place._parameters["bias"] = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return place


def _values(tensor: LazyTensor, dtype: str) -> Tensor:
    """The tensor in its own type or the wanted one, whichever is wider, so that only the end result is rounded."""
    stored = _FLOATS[tensor.dtype]
    values = torch.from_numpy(tensor.read()).view(stored).view(tensor.shape)
    return values.to(torch.promote_types(stored, _FLOATS[dtype]))


def _bytes(values: Tensor) -> np.ndarray:
    flat: np.ndarray = values.contiguous().view(-1).view(torch.uint8).numpy()
    return flat


def _word(dtype: torch.dtype) -> str:
    return next(word for word, known in _FLOATS.items() if known == dtype)


def _check_room(place: Path, files: Files) -> None:
    needed, free = _bytes_of(files), free_bytes(place.parent)
    if needed > free:
        raise ModelError(
            f"{place}: the merged model takes {in_words(needed)} and {in_words(free)} are free; make room{ELSEWHERE}"
        )


def _bytes_of(files: Files) -> int:
    return sum(tensor.num_bytes for tensors in files.values() for tensor in tensors)


def _tokenizer(
    source: ResolvedSource, saved: SavedAdapter, given: PreTrainedTokenizerBase | None, network: PreTrainedModel
) -> PreTrainedTokenizerBase:
    if given is None:
        base = AutoTokenizer.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
        tokenizer = tokenizer_of(saved, base)
    else:
        tokenizer = knowing(given, saved.settings)
    return padded_for(network.config, tokenizer) if gives_rewards(network.config) else tokenizer


def _write_settings(
    folder: Path,
    source: ResolvedSource,
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: DType | None,
) -> None:
    stored = (source.folder / "generation_config.json").is_file()
    given = GenerationConfig.from_pretrained(source.folder) if stored else network.generation_config
    config = network.config
    config.architectures = [type(network).__name__]
    generation = generation_config(config, tokenizer, given)
    write_settings(folder, config, generation, tokenizer, dtype=None if dtype is None else DTYPES[dtype])


def _certificate(source: ResolvedSource, saved: SavedAdapter, folder: Path, files: Files) -> Certificate | None:
    tensors = [tensor for tensors in files.values() for tensor in tensors]
    num_parameters = sum(math.prod(tensor.shape) for tensor in tensors)
    if not fits_in_memory(num_parameters):
        logger.warning("no certificate: %.2g parameters in float32 do not fit into free memory", num_parameters)
        return None
    rounded = any(tensor.dtype in _HALVES for tensor in tensors)
    certificate = certify(source.folder, saved.folder, folder, rounded=rounded, rank=saved.rank)
    certificate.write(folder)
    return certificate
