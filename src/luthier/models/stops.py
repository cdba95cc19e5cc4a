"""Where generation stops: every token that may end an answer, as others' tools read it from generation_config.json."""

from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from luthier.data.templates import stop_token_ids

__all__ = ["generation_config"]


def generation_config(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, given: GenerationConfig | None = None
) -> GenerationConfig:
    """`given`, or else what the configuration implies, stopping at the tokenizer's end and the template's end of turn.

    Raises TemplateError if there is a chat template that cannot be trained on.
    """
    settings = GenerationConfig.from_model_config(config) if given is None else GenerationConfig(**given.to_dict())
    known = settings.eos_token_id
    stops = set(known if isinstance(known, list) else [known]) | {tokenizer.eos_token_id}
    if tokenizer.chat_template is not None:
        stops |= stop_token_ids(tokenizer)
    ids = sorted(stops - {None})
    settings.eos_token_id = ids[0] if len(ids) == 1 else ids or None
    return settings
