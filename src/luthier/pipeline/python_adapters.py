"""Adapters of a model in memory, for Python: put on, loaded, saved and counted.

These functions take the model as `load` gives it, because tokenizer and base go with an adapter. Switching and mixing
are the network's business alone: `activate(model.network, "name")` and its neighbours in `adapters/switch.py`.
"""

import os
from dataclasses import replace
from pathlib import Path

from luthier.adapters.inject import DEFAULT_NAME
from luthier.adapters.new_tokens import with_tokens
from luthier.adapters.peft_format import read_adapter
from luthier.models.adapted import put_on, refuse_beside_others
from luthier.models.load import Model
from luthier.models.trainable import freeze_base, trainable_parameters
from luthier.pipeline.live import store_adapter
from luthier.pipeline.prepare import adapt
from luthier.recipe.adapters import AnyAdapter

__all__ = ["add_adapter", "load_adapter", "print_trainable_parameters", "save_adapter"]


def add_adapter(model: Model, settings: AnyAdapter, *, seed: int = 42, name: str = DEFAULT_NAME) -> None:
    """Puts a new adapter on the model, active besides those that are; the base is frozen. The model's tokenizer becomes
    a copy where it gets new tokens.

    Raises AdapterError for what does not fit the model or the adapters on it, RecipeError for new tokens that its
    tokenizer cannot take; the model is then as it was.
    """
    refuse_beside_others(settings, model.network)
    tokenizer = with_tokens(model.tokenizer, settings.new_tokens)
    adapt(replace(model, tokenizer=tokenizer), settings, seed=seed, name=name)
    model.tokenizer = tokenizer


def load_adapter(
    model: Model, folder: str | os.PathLike[str], *, name: str = DEFAULT_NAME, rank: int | None = None
) -> AnyAdapter:
    """Puts a saved adapter on the model, active besides those that are; returns its settings. The base is frozen.

    A base that it saw quantized is quantized; a tokenizer beside it becomes the model's. rank: the one to serve at, of
    a type that has several. Raises AdapterError where the folder holds no adapter, one for another model or another way
    of storing it, or one that does not go with the adapters that are there; the model is then as it was.
    """
    saved = read_adapter(Path(folder), rank=rank)
    put_on(model, saved, name=name)
    freeze_base(model.network)
    return saved.settings


def save_adapter(model: Model, folder: str | os.PathLike[str], *, name: str = DEFAULT_NAME) -> Path:
    """Writes one of the model's adapters in PEFT's layout, with the tokenizer where it has new tokens; returns the
    folder. Raises AdapterError.
    """
    store_adapter(model, Path(folder), name=name)
    return Path(folder)


def print_trainable_parameters(model: Model) -> None:
    """Prints how many parameters are trained, how many there are, and the share."""
    trained, total = trainable_parameters(model.network)
    print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}")
