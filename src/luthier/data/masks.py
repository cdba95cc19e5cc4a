"""A conversation becomes token ids with an exact loss mask: what is trained is what will be served.

For each trained turn of the assistant the template renders the conversation twice: up to the turn, with the generation
prompt, which is what a server feeds, and with the turn. The difference is what the model has to write. It is trained up
to and including the end-of-turn token; white space that a template adds after it opens the next turn and is not.
The ids before a trained turn are exactly those of `encode_prompt`. Where one sequence cannot hold to that for all
turns (a template that drops earlier thinking, or moves the system turn), the conversation becomes one sequence a turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from luthier.data.examples import Chat, Message, Origin
from luthier.data.markers import text_encoder
from luthier.data.sequences import TokenSequence
from luthier.data.served import ServedTurn, check_decoded, serve
from luthier.data.templates import Conversation, conversation_of
from luthier.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TrainOn", "encode_chat", "encode_continuation", "encode_prompt", "encode_text"]

TrainOn = Literal["assistant", "last", "all"]


def encode_prompt(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids that a server feeds to have this conversation answered: its messages and the generation prompt."""
    conversation = conversation_of(chat, tokenizer)
    return conversation.dialect.encoder.encode(conversation.render(conversation.turns, generation=True))


def encode_text(text: str, origin: Origin, tokenizer: PreTrainedTokenizerBase) -> TokenSequence:
    """Plain text, all of it trained, between what the tokenizer puts around a document and its end-of-text token.

    Before it stands what the tokenizer itself adds (BOS for Llama and Gemma, nothing for GPT-2 or Qwen), after it
    `eos_token`, so that the model learns where documents end. A special token that the text spells stays text.
    """
    before, after = _around(tokenizer)
    if not after and tokenizer.eos_token_id is not None:
        after = [tokenizer.eos_token_id]
    ids = [*before, *_plain(text, origin, tokenizer), *after]
    return _sequence(ids, [(0, len(ids))], origin)


def encode_continuation(start: str, end: str, origin: Origin, tokenizer: PreTrainedTokenizerBase) -> TokenSequence:
    """Plain text that goes on, of which the end is trained: the tokens from where the start alone has others.

    Before it stands what the tokenizer itself adds, after it nothing.
    """
    before, _ = _around(tokenizer)
    ids, alone = ([*before, *_plain(text, origin, tokenizer)] for text in (start + end, start))
    shared = next((i for i, pair in enumerate(zip(ids, alone, strict=False)) if pair[0] != pair[1]), len(alone))
    return _sequence(ids, [(shared, len(ids))], origin)


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before a text, and after it."""
    bare, dressed = (list(tokenizer.encode("x", add_special_tokens=special)) for special in (False, True))
    start = next((i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare), 0)
    return dressed[:start], dressed[start + len(bare) :]


def _plain(text: str, origin: Origin, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The text's ids; a special token that it spells stays text."""
    encoder = text_encoder(tokenizer)
    try:
        return encoder.encode(encoder.guard(text))
    except DataError as error:
        raise type(error)(f"{origin}: {error}") from error


def encode_chat(
    chat: Chat, origin: Origin, tokenizer: PreTrainedTokenizerBase, *, train_on: TrainOn = "assistant"
) -> list[TokenSequence]:
    """One sequence for the conversation, or one for each trained turn where the template shows earlier turns anew.

    train_on: every turn of the assistant, its last, or all tokens. `Message.trained` overrides it for a turn of the
    assistant. Messages after the last trained turn are left out: nothing that is trained can see them. A conversation
    without a trained turn gives one sequence in which nothing is trained.
    Raises TemplateError, with origin and reason, if what would be trained is not what would be served.
    """
    try:
        if train_on == "all":
            return [_everything(chat, origin, tokenizer)]
        return _trained_turns(chat, origin, tokenizer, train_on)
    except DataError as error:
        raise type(error)(f"{origin}: {error}") from error


def _everything(chat: Chat, origin: Origin, tokenizer: PreTrainedTokenizerBase) -> TokenSequence:
    if any(message.trained is False for message in chat.messages):
        raise DataError('a turn is marked as not trained, but "train_on" is all; choose train_on: assistant')
    conversation = conversation_of(chat, tokenizer)
    encode = conversation.dialect.encoder.encode
    if chat.messages[-1].role == "assistant":
        served = serve(conversation, len(conversation.turns) - 1)
        ids = served.prompt_ids + encode(served.answer, continues=True)
    else:
        ids = encode(conversation.render(conversation.turns))
    return _sequence(ids, [(0, len(ids))], origin)


def _trained_turns(
    chat: Chat, origin: Origin, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn
) -> list[TokenSequence]:
    conversation = conversation_of(chat, tokenizer)
    places = [i for i, turn in enumerate(conversation.turns) if turn["role"] == "assistant"]
    chosen = _chosen(chat.messages, train_on)
    served = [serve(conversation, place) for place, trained in zip(places, chosen, strict=True) if trained]
    if not served:
        ids = conversation.dialect.encoder.encode(conversation.render(conversation.turns))
        return [_sequence(ids, [], origin)]
    if _nested(served):
        return [_assemble(conversation, served, origin)]
    return [_assemble(conversation, [one], origin) for one in served]


def _chosen(messages: Sequence[Message], train_on: TrainOn) -> list[bool]:
    """Whether each of the assistant's turns, in order, is trained."""
    if any(message.trained and message.role != "assistant" for message in messages):
        raise DataError("a turn that is not the assistant's is marked as trained; choose train_on: all, or unmark it")
    said = [message for message in messages if message.role == "assistant"]
    default = [train_on == "assistant" or i == len(said) - 1 for i in range(len(said))]
    return [usual if message.trained is None else message.trained for message, usual in zip(said, default, strict=True)]


def _nested(served: Sequence[ServedTurn]) -> bool:
    """Whether the last prompt begins with every earlier turn as it was served, in text and in token ids."""
    last = served[-1]
    return all(
        last.prompt.startswith(one.text) and last.prompt_ids[: len(one.prompt_ids)] == one.prompt_ids
        for one in served[:-1]
    )


def _assemble(conversation: Conversation, served: Sequence[ServedTurn], origin: Origin) -> TokenSequence:
    """The last turn's prompt and answer as one sequence; each answer is trained up to its end-of-turn token."""
    dialect, last = conversation.dialect, served[-1]
    stop_ids = dialect.stop_ids
    ids = last.prompt_ids + dialect.encoder.encode(last.answer, continues=True)
    spans = []
    for one in served:
        start = len(one.prompt_ids)
        end = next(i for i in range(start, len(ids)) if ids[i] in stop_ids) + 1
        check_decoded(dialect.encoder.decode(ids[start:end]), one.turn)
        spans.append((start, end))
    return _sequence(ids, spans, origin)


def _sequence(ids: Sequence[int], spans: Sequence[tuple[int, int]], origin: Origin) -> TokenSequence:
    trained = np.zeros(len(ids), dtype=np.bool_)
    for start, end in spans:
        trained[max(start, 1) : end] = True  # nothing stands before token 0, so it is never a target
    return TokenSequence(np.asarray(ids, dtype=np.int32), trained, origin)
