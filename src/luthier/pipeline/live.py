"""A model in memory from stage to stage: its adapter merged, its network exchanged, its way back after a failure.

Here a model's network is what its source holds, rounded to the network's type, with one adapter on it at most. So an
adapter is merged into the source's own weights and the result read back: what training had rounded is not stored, and
what follows has the same bits as a recipe's next stage. Only one network exists at a time.
"""

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

from torch import nn

from luthier.adapters.inject import DEFAULT_NAME, adapted_layers
from luthier.adapters.merge import remove_adapters
from luthier.adapters.peft_format import save_adapter
from luthier.errors import AdapterError, ModelError
from luthier.models.adapted import carried_settings
from luthier.models.heads import with_head
from luthier.models.load import DTYPES, Model, load_either
from luthier.models.merge import merge_into
from luthier.models.quantize import quantized_as
from luthier.models.recompute import checkpoint_layers
from luthier.models.save import save
from luthier.models.sources import ResolvedSource, resolve
from luthier.recipe.preference import RewardModel
from luthier.recipe.training import DType, Training
from luthier.training.checkpoints import load_trained

__all__ = [
    "carries_adapter",
    "dtype_of",
    "merge_carried",
    "set_aside",
    "settle",
    "start_digest",
    "store_adapter",
    "store_trained",
    "undo",
    "write_merged",
]

_CHARACTERS_OF_DIGEST = 12


def dtype_of(model: Model) -> DType:
    """The settings' word for the type of the weights. Raises ModelError for a type that no stage trains."""
    words: tuple[DType, ...] = get_args(DType)
    for word in words:
        if model.dtype == DTYPES[word]:
            return word
    raise ModelError(f"{model.source.name}: its weights are {model.dtype}; load it with dtype {' or '.join(words)}")


def carries_adapter(model: Model) -> bool:
    """Whether there is an adapter to be merged."""
    return bool(adapted_layers(model.network))


def start_digest(model: Model) -> str:
    """Says which source and which adapter on it the model is."""
    digest = hashlib.sha256(model.source.weights_hash.encode())
    with _saved_adapter(model) as folder:
        for file in sorted(folder.iterdir()):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:_CHARACTERS_OF_DIGEST]


def write_merged(model: Model, place: Path, *, dtype: DType | None = None) -> Path:
    """Writes the source with the model's adapter merged in; the model in memory keeps its adapter. Returns the place.

    dtype: of the weights in the file, by default that of the source.
    """
    with _saved_adapter(model) as folder:
        return merge_into(model.source, folder, place, dtype=dtype, tokenizer=model.tokenizer).folder


def merge_carried(model: Model, place: Path) -> None:
    """Makes the model one without adapter, which is stored in `place` and computes what the adapted one did."""
    if not place.is_dir():
        write_merged(model, place)
    _exchange(model, resolve(str(place), model.source.environment))


def settle(model: Model, settings: Training, folder: Path, place: Path) -> None:
    """After a stage in `folder`: the network ready for use, and what was trained without an adapter stored in `place`,
    which is the model's source from now on.
    """
    _rest(model)
    if settings.adapter is None:
        store_trained(model, settings, folder, place)
        model.source = resolve(str(place), model.source.environment)


def store_adapter(model: Model, folder: Path, *, name: str = DEFAULT_NAME) -> None:
    """Writes one of the model's adapters, saying over which base, and with the tokenizer where it has new tokens.

    Raises AdapterError if the model has none of this name, or the folder cannot be written.
    """
    save_adapter(
        model.network,
        folder,
        base_model=model.source.name,
        base_sha256=model.source.weights_hash,
        quantize_base=quantized_as(model.network),
        base_dtype=dtype_of(model),
        name=name,
    )
    if carried_settings(model.network)[name].new_tokens:
        model.tokenizer.save_pretrained(folder)


def store_trained(model: Model, settings: Training, folder: Path, place: Path) -> None:
    """Writes a model that was trained without an adapter in `folder`: what was trained, over the weights as stored."""
    if settings.dtype == "fp32":
        save(model, place)
    else:
        stored = load_either(str(model.source.folder), dtype="fp32", environment=model.source.environment)
        if isinstance(settings, RewardModel):
            stored = with_head(stored, seed=settings.seed)
        stored.tokenizer = model.tokenizer
        load_trained(stored.network, folder / "checkpoints" / "last")
        save(stored, place)


def undo(model: Model, settings: Training) -> None:
    """After a stage that failed: the model as it was before it."""
    if settings.adapter is None or quantized_as(model.network) or isinstance(settings, RewardModel):
        _exchange(model, model.source)
    else:
        remove_adapters(model.network)
        _rest(model)


def _rest(model: Model) -> None:
    model.network.eval()
    checkpoint_layers(model.network, 0)


def _exchange(model: Model, source: ResolvedSource) -> None:
    """Another network in the old one's type, place and attention. The old one is emptied before the other is read."""
    with set_aside(model):
        model.source = source


@contextmanager
def set_aside(model: Model) -> Iterator[None]:
    """Without the network for the time of the context; at its end it is read anew from what is the model's source then,
    in the type, place and attention that it had.
    """
    dtype, device, attention = dtype_of(model), model.device, model.config._attn_implementation
    model.network.to("meta")
    try:
        yield
    finally:
        place, environment = str(model.source.folder), model.source.environment
        fresh = load_either(place, dtype=dtype, device=device, attention=attention, environment=environment)
        model.network = fresh.network


@contextmanager
def _saved_adapter(model: Model) -> Iterator[Path]:
    """The model's adapter as files, for a while."""
    with tempfile.TemporaryDirectory() as folder:
        store_adapter(model, Path(folder), name=_only_adapter(model.network))
        yield Path(folder)


def _only_adapter(network: nn.Module) -> str:
    """The name of the one adapter. Raises AdapterError if there are several, or one that does not apply as a whole."""
    layers = adapted_layers(network)
    names: list[str] = sorted({name for layer in layers.values() for name in layer.adapters})
    idle = [path for path, layer in layers.items() if set(layer.active) != set(layer.adapters)]
    if len(names) > 1 or idle:
        state = f"switched off at {idle[0]}" if idle else "several"
        raise AdapterError(
            f"the model carries the adapters {', '.join(names)}, {state}; leave one, switched on, or remove them"
        )
    share = next((s for layer in layers.values() if (s := layer.shares.get(names[0], 1.0)) != 1), None)
    if share is not None:
        raise AdapterError(
            f"the model carries the adapter {names[0]}, mixed by a share of {share:g}; activate it as a whole, or "
            "remove it"
        )
    return names[0]
