"""Every example becomes what a step counts: token sequences, or a group of answers behind one prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from luthier.data.examples import Chat, Example, Feedback, Origin, Preference, Prompt, Steps, Text
from luthier.data.masks import TrainOn, encode_chat, encode_prompt, encode_text
from luthier.data.pairs import encode_feedback, encode_preference, encode_steps
from luthier.data.sequences import Item, TokenSequence
from luthier.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["encode"]


def encode(example: Example, origin: Origin, tokenizer: PreTrainedTokenizerBase, *, train_on: TrainOn) -> list[Item]:
    """The items of one example; a conversation may become several. Of a prompt no token is trained.

    train_on: of conversations, and of nothing else.

    Raises TemplateError, with origin and reason, if what would be trained is not what would be served.
    """
    match example:
        case Text():
            return [encode_text(example.text, origin, tokenizer)]
        case Chat():
            return [*encode_chat(example, origin, tokenizer, train_on=train_on)]
        case Preference():
            return [encode_preference(example, origin, tokenizer)]
        case Feedback():
            return [encode_feedback(example, origin, tokenizer)]
        case Steps():
            return [encode_steps(example, origin, tokenizer)]
        case Prompt():
            return [_asked(example, origin, tokenizer)]


def _asked(example: Prompt, origin: Origin, tokenizer: PreTrainedTokenizerBase) -> TokenSequence:
    try:
        ids = np.asarray(encode_prompt(Chat(example.messages, example.tools), tokenizer), dtype=np.int32)
    except DataError as error:
        raise type(error)(f"{origin}: {error}") from error
    return TokenSequence(ids, np.zeros(len(ids), dtype=np.bool_), origin)
