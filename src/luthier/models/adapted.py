"""A saved adapter put on a model, over a base as the adapter saw it: quantized, if it was trained so.

A tokenizer that lies beside the adapter is the one that it was trained with, and goes before the base's. Where other
adapters are there already, the base and the tokenizer are theirs too, and one that needs others is refused.
"""

from pathlib import Path

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from luthier.adapters.inject import DEFAULT_NAME, adapted_layers
from luthier.adapters.new_tokens import knowing
from luthier.adapters.peft_format import SavedAdapter, load_adapter, read_adapter
from luthier.errors import AdapterError
from luthier.models.heads import trains_head
from luthier.models.load import DTYPES, Model, load
from luthier.models.quantize import quantize_base, quantized_as
from luthier.models.quiet import quiet
from luthier.models.sources import ResolvedSource
from luthier.recipe.adapters import AnyAdapter, LoRA

__all__ = [
    "carried_settings",
    "load_adapted",
    "put_on",
    "refuse_beside_others",
    "refuse_wrong_base",
    "tokenizer_of",
]


def load_adapted(name: str, adapter: Path, *, rank: int | None = None) -> Model:
    """The model of this name with the adapter in the folder. rank: the one to serve at, of a type that has several.

    Raises AdapterError for an adapter with a head, which gives rewards, and what `load` and `load_adapter` raise.
    """
    saved = read_adapter(adapter, rank=rank)
    if trains_head(saved.settings):
        raise AdapterError(f"{adapter}: was trained with a head, so it gives rewards and no text; see load_reward")
    model = load(name, dtype=saved.base_dtype if saved.quantize_base else "fp32")
    put_on(model, saved)
    return model


def put_on(model: Model, saved: SavedAdapter, *, name: str = DEFAULT_NAME) -> None:
    """Puts a saved adapter on the model, active besides those that are. The base is quantized if the adapter saw it so,
    and the tokenizer becomes the adapter's, unless other adapters are there.

    Raises AdapterError for an adapter that does not fit the model as it is stored, or the adapters on it, with the
    model as it was.
    """
    refuse_wrong_base(saved, model.source)
    _refuse_other_storage(saved, model)
    refuse_beside_others(saved.settings, model.network)
    tokenizer = tokenizer_of(saved, model.tokenizer)
    has_tokens = any(settings.new_tokens for settings in carried_settings(model.network).values())
    load_adapter(model.network, saved.folder, name=name, rank=saved.rank)
    if saved.quantize_base and not quantized_as(model.network):
        quantize_base(model.network, saved.quantize_base)
    if not has_tokens:
        model.tokenizer = tokenizer


def carried_settings(network: nn.Module) -> dict[str, AnyAdapter]:
    """The settings of the adapters that the model carries, by name."""
    layers = adapted_layers(network).values()
    return {name: adapter.settings for layer in layers for name, adapter in layer.adapters.items()}


def refuse_beside_others(settings: AnyAdapter, network: nn.Module) -> None:
    """Raises AdapterError for an adapter that cannot stand on the network beside those that are there: both have new
    tokens, other ones, which would get the same numbers; or one wants a quantized base without parts of the weights.
    """
    carried = carried_settings(network)
    for name, other in carried.items():
        tokens, ids = other.new_tokens, other.trainable_token_indices
        if tokens and settings.new_tokens and (settings.new_tokens, settings.trainable_token_indices) != (tokens, ids):
            raise AdapterError(
                f'new_tokens: the adapter "{name}" has some already ({", ".join(tokens)}), and others would get their '
                "numbers; train all of them with one adapter, or load the model anew for this one"
            )
    starts = (each.init for each in (settings, *carried.values()) if isinstance(each, LoRA) and each.takes_parts)
    if quantized_as(network) and (init := next(starts, None)):
        raise AdapterError(
            f"init: over a quantized base an adapter that starts with {init} stands alone, for the base is stored "
            "without what it took; load the model anew for it"
        )


def _refuse_other_storage(saved: SavedAdapter, model: Model) -> None:
    stored, others = quantized_as(model.network), carried_settings(model.network)
    if saved.quantize_base != stored and (stored or others):
        raise AdapterError(
            f"{saved.folder}: was trained over a base that is {saved.quantize_base or 'dense'}, and this model's is "
            f"{stored or 'dense'}; load the model anew for it"
        )
    if saved.quantize_base and model.dtype != DTYPES[saved.base_dtype]:
        raise AdapterError(
            f"{saved.folder}: its base was quantized from weights in {saved.base_dtype}; load the model with dtype "
            f"{saved.base_dtype}"
        )


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
