"""A model loaded with an adapter on it, over a base as the adapter saw it: quantized, if it was trained so.

A tokenizer that lies beside the adapter is the one that it was trained with, and goes before the base's.
"""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from luthier.adapters.new_tokens import knowing
from luthier.adapters.peft_format import SavedAdapter, load_adapter, read_adapter
from luthier.errors import AdapterError
from luthier.models.load import Model, load
from luthier.models.quantize import quantize_base
from luthier.models.quiet import quiet
from luthier.models.sources import ResolvedSource

__all__ = ["load_adapted", "refuse_wrong_base", "tokenizer_of"]


def load_adapted(name: str, adapter: Path, *, rank: int | None = None) -> Model:
    """The model of this name with the adapter in the folder. rank: the one to serve at, of a type that has several.

    Raises what `load` and `load_adapter` raise.
    """
    saved = read_adapter(adapter, rank=rank)
    model = load(name, dtype=saved.base_dtype if saved.quantize_base else "fp32")
    refuse_wrong_base(saved, model.source)
    load_adapter(model.network, adapter, rank=rank)
    if saved.quantize_base:
        quantize_base(model.network, saved.quantize_base)
    model.tokenizer = tokenizer_of(saved, model.tokenizer)
    return model


def refuse_wrong_base(saved: SavedAdapter, source: ResolvedSource) -> None:
    """Raises AdapterError if the adapter says that it was trained on other weights than these."""
    if saved.base_sha256 not in (None, source.weights_hash):
        named = f" ({saved.base_model})" if saved.base_model else ""
        raise AdapterError(
            f"{saved.folder}: made for another model: the weights of {source.name} are not those that it was trained "
            f"on{named}; give that model"
        )


def tokenizer_of(saved: SavedAdapter, base: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer beside the adapter, or else its base's, with the new tokens that the adapter has rows for.

    Raises AdapterError where the one beside it cannot be read, or numbers the new tokens otherwise.
    """
    tokenizer = base
    if (saved.folder / "tokenizer_config.json").is_file():
        try:
            with quiet():
                tokenizer = AutoTokenizer.from_pretrained(saved.folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise AdapterError(f"{saved.folder}: its tokenizer cannot be read ({error}); copy it again") from error
        tokenizer.chat_template = tokenizer.chat_template or base.chat_template
    return knowing(tokenizer, saved.settings)
