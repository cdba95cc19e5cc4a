"""Adapters of a model in memory, for Python: put on, loaded, saved and counted.

These functions take the model as `load` gives it, because tokenizer and base go with an adapter. Switching and mixing
are the network's business alone: `activate(model.network, "name")` and its neighbours in `adapters/switch.py`.
"""

import os
from pathlib import Path

from luthier.adapters import peft_format
from luthier.adapters.inject import DEFAULT_NAME, inject
from luthier.models.adapted import refuse_wrong_base, tokenizer_of
from luthier.models.load import Model
from luthier.models.quantize import quantize_base, quantized_as
from luthier.models.trainable import freeze_all, trainable_parameters
from luthier.pipeline.live import dtype_of
from luthier.recipe.adapters import AnyAdapter

__all__ = ["add_adapter", "load_adapter", "print_trainable_parameters", "save_adapter"]


def add_adapter(model: Model, settings: AnyAdapter, *, seed: int = 42, name: str = DEFAULT_NAME) -> None:
    """Puts a new adapter on the model, active besides those that are; the model itself is frozen.

    Raises AdapterError for what does not fit the model, with the model as it was.
    """
    freeze_all(model.network)
    inject(model.network, settings, seed=seed, name=name, encode=model.tokenizer.encode)


def load_adapter(
    model: Model, folder: str | os.PathLike[str], *, name: str = DEFAULT_NAME, rank: int | None = None
) -> AnyAdapter:
    """Puts a saved adapter on the model, active besides those that are; returns its settings.

    A base that it saw quantized is quantized; a tokenizer beside it becomes the model's. rank: the one to serve at, of
    a type that has several. Raises AdapterError where the folder holds no adapter, or one for another model; the model
    is then as it was.
    """
    saved = peft_format.read_adapter(Path(folder), rank=rank)
    refuse_wrong_base(saved, model.source)
    tokenizer = tokenizer_of(saved, model.tokenizer)
    settings = peft_format.load_adapter(model.network, Path(folder), name=name, rank=rank)
    if saved.quantize_base and not quantized_as(model.network):
        quantize_base(model.network, saved.quantize_base)
    model.tokenizer = tokenizer
    return settings


def save_adapter(model: Model, folder: str | os.PathLike[str], *, name: str = DEFAULT_NAME) -> Path:
    """Writes one of the model's adapters in PEFT's layout; returns the folder. Raises AdapterError."""
    peft_format.save_adapter(
        model.network,
        Path(folder),
        base_model=model.source.name,
        base_sha256=model.source.weights_hash,
        quantize_base=quantized_as(model.network),
        base_dtype=dtype_of(model),
        name=name,
    )
    return Path(folder)


def print_trainable_parameters(model: Model) -> None:
    """Prints how many parameters are trained, how many there are, and the share."""
    trained, total = trainable_parameters(model.network)
    print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}")
