"""A model loaded with an adapter on it, over a base as the adapter saw it: quantized, if it was trained so."""

from pathlib import Path

from luthier.adapters.peft_format import load_adapter, read_adapter
from luthier.models.load import Model, load
from luthier.models.quantize import quantize_base

__all__ = ["load_adapted"]


def load_adapted(name: str, adapter: Path, *, rank: int | None = None) -> Model:
    """The model of this name with the adapter in the folder. rank: the one to serve at, of a type that has several.

    Raises what `load` and `load_adapter` raise.
    """
    saved = read_adapter(adapter, rank=rank)
    model = load(name, dtype=saved.base_dtype if saved.quantize_base else "fp32")
    load_adapter(model.network, adapter, rank=rank)
    if saved.quantize_base:
        quantize_base(model.network, saved.quantize_base)
    return model
