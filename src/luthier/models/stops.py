"""Where generation stops: every token that may end an answer, as others' tools read it from generation_config.json."""

import logging

from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from luthier.data.templates import stop_token_ids
from luthier.errors import TemplateError

__all__ = ["generation_config", "template_stops"]

_LOG = logging.getLogger(__name__)


def generation_config(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, given: GenerationConfig | None = None
) -> GenerationConfig:
    """`given`, or else what the configuration implies, stopping at the tokenizer's end and the template's end of turn.

    A chat template that cannot be trained on adds no token; training on it will be refused.
    """
    settings = GenerationConfig.from_model_config(config) if given is None else GenerationConfig(**given.to_dict())
    known = settings.eos_token_id
    stops = set(known if isinstance(known, list) else [known]) | {tokenizer.eos_token_id}
    ids = sorted((stops | template_stops(tokenizer)) - {None})
    settings.eos_token_id = ids[0] if len(ids) == 1 else ids or None
    try:
        settings.validate(strict=True)
    except ValueError:  # nearly always a temperature without do_sample, which transformers reads but will not save
        settings.do_sample = True
    return settings


def template_stops(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a turn; none where the template cannot be trained on, or there is none."""
    if tokenizer.chat_template is None:
        return set()
    try:
        return stop_token_ids(tokenizer)
    except TemplateError as error:
        _LOG.warning("generation stops at %r alone: %s", tokenizer.eos_token, error)
        return set()
