"""A reward model's network: the body of a causal model under a scalar head, as transformers' sequence classification.

The body is the language model's own and no copy; its output layer goes. transformers reads the reward of a padded row
at its last token that is no padding, so the padding token must be one that never ends a conversation: where the
tokenizer pads with its end-of-turn token, as many do, another of its special tokens is taken.
"""

import logging
from copy import deepcopy

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from luthier.adapters.inject import adapted_layers
from luthier.data.batches import TokenBatch
from luthier.errors import AdapterError, ModelError
from luthier.models.load import HEAD, Model, gives_rewards, refuse_other_head
from luthier.models.quiet import quiet
from luthier.models.score import hidden_states
from luthier.models.stops import template_stops
from luthier.recipe.adapters import AnyAdapter

__all__ = [
    "head_outline",
    "padded_for",
    "score_rewards",
    "trains_head",
    "with_head",
    "with_head_beside",
    "with_trained_head",
]

logger = logging.getLogger(__name__)


def with_head(model: Model, *, seed: int) -> Model:
    """The body of a language model under a new head, whose weights are drawn from N(0, 1 / (hidden + 1)).

    Stiennon et al. 2020, appendix B.1. The network given is used up: its configuration becomes the reward model's, and
    its body's tensors are those of the result, which pads with a token that ends no conversation. A reward model is
    returned as it is.
    Raises ModelError for an architecture that transformers cannot put under a head, AdapterError where adapters are on
    the network.
    """
    if gives_rewards(model.config):
        return model
    if adapted := list(adapted_layers(model.network)):
        raise AdapterError(f"{adapted[0]}: carries an adapter, and the model gets a head; merge the adapter first")
    return _under_head(model, model.config, seed)


def with_head_beside(model: Model) -> Model:
    """The body of a language model under a second head, which has no values yet; the model stays what it is, and what
    is put on its body later is on both. Raises ModelError as `with_head` does.
    """
    return _under_head(model, deepcopy(model.config), seed=0)


def _under_head(model: Model, config: PretrainedConfig, seed: int) -> Model:
    old, stops = model.network, model.network.generation_config
    with torch.device("meta"):
        network = head_outline(config, model.source.name)
    prefix, body = network.base_model_prefix, old.base_model
    if type(getattr(network, prefix)) is not type(body):
        raise ModelError(f"{model.source.name}: a {type(network).__name__} has another body; choose another model")
    setattr(network, prefix, body)
    head = network.get_submodule(HEAD)
    head.weight = nn.Parameter(_drawn(head.in_features, seed).to(model.device, model.dtype))
    network.generation_config = stops
    return Model(network.train(old.training), padded_for(network.config, model.tokenizer), model.source)


def _drawn(size: int, seed: int) -> Tensor:
    values = torch.empty(1, size, device="cpu", dtype=torch.float32)
    return values.normal_(0, (size + 1) ** -0.5, generator=torch.Generator().manual_seed(seed))


def head_outline(config: PretrainedConfig, name: str) -> PreTrainedModel:
    """A reward model's network of this configuration, which becomes its own. name: of the model, for errors.

    Raises ModelError for an architecture that transformers cannot put under a head.
    """
    config.num_labels, config.problem_type = 1, "regression"  # so that a text-classification pipeline adds no sigmoid
    config.id2label, config.label2id = {0: "reward"}, {"reward": 0}
    try:
        with quiet():
            network: PreTrainedModel = AutoModelForSequenceClassification.from_config(
                config, dtype=config.dtype, attn_implementation=config._attn_implementation
            )
    except ValueError as error:
        raise ModelError(
            f"{name}: transformers has no sequence classification for {config.model_type}; choose another model"
        ) from error
    refuse_other_head(network, name)
    config.architectures = [type(network).__name__]
    return network


def score_rewards(model: Model | PreTrainedModel, batch: TokenBatch, places: Tensor | None = None) -> Tensor:
    """r = w . h, with h the last hidden state at each sequence's last token: [sequences], differentiable.

    places: other positions of the stream to read rewards at. In float32 at least, whatever the network's type.
    Stiennon et al. 2020, section 3.4.
    """
    network = model.network if isinstance(model, Model) else model
    batch = batch.to(network.device)
    places = batch.last_index if places is None else places
    hidden, weight = hidden_states(network, batch)[places], network.get_submodule(HEAD).weight
    wide = torch.promote_types(hidden.dtype, torch.float32)
    rewards: Tensor = (hidden.to(wide) @ weight.to(wide).T).squeeze(-1)
    return rewards


def trains_head(settings: AnyAdapter) -> bool:
    """Whether an adapter of these settings makes a language model a reward model."""
    return HEAD in settings.modules_to_save


def with_trained_head(settings: AnyAdapter) -> AnyAdapter:
    """The settings of an adapter that trains the head wholly besides, which is PEFT's way to save it."""
    if trains_head(settings):
        return settings
    return settings.model_copy(update={"modules_to_save": (*settings.modules_to_save, HEAD)})


def padded_for(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy of it, that pads with a token which never ends a conversation, and says so in the
    configuration too. Without any such token there is no padding, which transformers says at the first larger batch.
    """
    text = config.get_text_config()
    token_id = _padding(tokenizer, text.vocab_size)
    text.pad_token_id = config.pad_token_id = token_id
    if token_id is None:
        logger.warning("no special token is left to pad with: transformers will take one sequence at a time")
    if token_id == tokenizer.pad_token_id:
        return tokenizer
    tokenizer = deepcopy(tokenizer)
    tokenizer.pad_token = None if token_id is None else tokenizer.convert_ids_to_tokens(token_id)
    return tokenizer


def _padding(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int | None:
    """The padding token that there is, or else the unknown token, or else a special one, one named for it first."""
    ends = template_stops(tokenizer) | {tokenizer.eos_token_id}
    special = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = [number for number in (tokenizer.pad_token_id, tokenizer.unk_token_id) if number is not None]
    others = sorted(special, key=lambda number: ("pad" not in special[number], -number))
    usable = (number for number in (*named, *others) if number not in ends and number < vocab_size)
    return next(usable, None)
