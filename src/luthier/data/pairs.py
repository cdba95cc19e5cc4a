"""Preferences and verdicts become token groups: answers behind one prompt, of which only the answers are trained.

Each answer is encoded as the end of a conversation of its own (`encode_chat`), so before its first trained token stand
exactly the ids that a server feeds for the prompt. The prompt is rendered without any answer behind it; a template that
shows a turn otherwise once it is answered therefore cannot make the prompts of two answers differ. A reward model alone
reads conversations whole, as the template writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from luthier.data.examples import Chat, Feedback, Message, Origin, Preference, Steps
from luthier.data.masks import encode_chat, encode_prompt
from luthier.data.sequences import TokenGroup, TokenSequence
from luthier.data.templates import conversation_of, encode_whole
from luthier.errors import DataError, TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "encode_feedback",
    "encode_for_reward",
    "encode_preference",
    "encode_steps",
    "num_prompt",
    "with_mismatched",
]


def encode_preference(example: Preference, origin: Origin, tokenizer: PreTrainedTokenizerBase) -> TokenGroup:
    """The answers behind their prompt, best first; trained are all turns of the assistant in an answer, no other.

    What a message says of its own training (`Message.trained`) does not count here. Raises TemplateError, with origin
    and reason, where the template cannot show an answer as it is served.
    """
    sequences = [_answered(example.prompt, one, example.tools, origin, tokenizer) for one in example.answers]
    first = sequences[0].token_ids[: num_prompt(sequences[0])]
    assert all(np.array_equal(one.token_ids[: num_prompt(one)], first) for one in sequences)
    return TokenGroup(tuple(sequences), scores=example.scores)


def encode_for_reward(
    example: Preference, origin: Origin, tokenizer: PreTrainedTokenizerBase, *, padding_id: int | None = None
) -> TokenGroup:
    """The answers behind their prompt, best first, each to the last token that a reward model reads.

    padding_id: of the model; such tokens at the end are left out, as transformers' classifiers do. Called trained are
    the tokens that are not the prompt's. Raises TemplateError, with origin and reason, for what cannot be rendered.
    """
    try:
        prompt = np.asarray(encode_prompt(Chat(example.prompt, example.tools), tokenizer), dtype=np.int32)
        chats = [Chat((*example.prompt, *answer), example.tools) for answer in example.answers]
        read = [np.asarray(encode_whole(chat, tokenizer), dtype=np.int32) for chat in chats]
    except DataError as error:
        raise type(error)(f"{origin}: {error}") from error
    return TokenGroup(tuple(_read(ids, prompt, padding_id, origin) for ids in read), scores=example.scores)


def encode_feedback(example: Feedback, origin: Origin, tokenizer: PreTrainedTokenizerBase) -> TokenGroup:
    """The one answer, trained, behind its prompt, in which nothing is. Raises TemplateError like a preference."""
    *prompt, answer = example.chat.messages
    sequence = _answered(prompt, [answer], example.chat.tools, origin, tokenizer)
    return TokenGroup((sequence,), desirable=example.desirable)


def encode_steps(example: Steps, origin: Origin, tokenizer: PreTrainedTokenizerBase) -> TokenGroup:
    """The prompt, and each step with a line break behind it, tokenized by itself; called trained is its last token.

    Raises TemplateError, with origin and reason, if the template refuses the prompt.
    """
    try:
        conversation = conversation_of(Chat(example.prompt, example.tools), tokenizer)
        encoder = conversation.dialect.encoder
        pieces = [encode_prompt(Chat(example.prompt, example.tools), tokenizer)]
        pieces += [encoder.encode(encoder.guard(f"{step}\n"), continues=True) for step in example.steps]
    except DataError as error:
        raise type(error)(f"{origin}: {error}") from error
    ends = np.cumsum([len(piece) for piece in pieces])
    trained = np.zeros(ends[-1], dtype=np.bool_)
    trained[ends[1:] - 1] = True
    sequence = TokenSequence(np.concatenate(pieces).astype(np.int32), trained, origin)
    return TokenGroup((sequence,), correct=example.correct)


def num_prompt(sequence: TokenSequence) -> int:
    """How many tokens come before the first trained one; all of them where none is trained."""
    return int(sequence.trained.argmax()) if sequence.trained.any() else len(sequence)


def with_mismatched(groups: Sequence[TokenGroup], *, seed: int, max_length: int) -> list[TokenGroup]:
    """The groups, each with another group's answer to its own prompt: what KTO's KL baseline is measured on.

    Every answer is used once and by no group of its own; which by which depends on the seed and the number of groups
    alone (Ethayarajh et al. 2024, section 4.1: mismatched pairs). An answer is cut at max_length tokens.
    Raises DataError where there is only one group.
    """
    if len(groups) < 2:
        raise DataError("KTO compares each answer with another row's, and there is only one row; give it more")
    circle = np.random.default_rng(seed).permutation(len(groups)).tolist()
    answers = dict(zip(circle, [*circle[1:], circle[0]], strict=True))
    return [
        replace(group, mismatched=_mismatched(group.sequences[0], groups[answers[i]].sequences[0], max_length))
        for i, group in enumerate(groups)
    ]


def _mismatched(own: TokenSequence, other: TokenSequence, max_length: int) -> TokenSequence:
    prompt, answer = slice(num_prompt(own)), slice(num_prompt(other), None)
    token_ids = np.concatenate([own.token_ids[prompt], other.token_ids[answer]])[:max_length]
    trained = np.concatenate([own.trained[prompt], other.trained[answer]])[:max_length]
    return TokenSequence(token_ids, trained, own.origin)


def _read(ids: NDArray[np.int32], prompt: NDArray[np.int32], padding_id: int | None, origin: Origin) -> TokenSequence:
    if padding_id is not None:
        ids = ids[: np.flatnonzero(ids != padding_id)[-1] + 1]
    shortest = min(len(ids) - 1, len(prompt))
    unlike = np.flatnonzero(ids[:shortest] != prompt[:shortest])
    start = int(unlike[0]) if len(unlike) else shortest
    return TokenSequence(ids, np.arange(len(ids)) >= max(start, 1), origin)


def _answered(
    prompt: Iterable[Message],
    answer: Iterable[Message],
    tools: tuple[dict[str, Any], ...],
    origin: Origin,
    tokenizer: PreTrainedTokenizerBase,
) -> TokenSequence:
    turns = (*_marked(prompt, trained=False), *_marked(answer, trained=True))
    sequences = encode_chat(Chat(turns, tools), origin, tokenizer, train_on="last")
    if len(sequences) > 1:
        raise TemplateError(
            f"{origin}: the chat template shows an answer's first turns otherwise once later ones follow, so they make "
            "no one sequence; keep the last turn of each answer"
        )
    return sequences[0]


def _marked(messages: Iterable[Message], *, trained: bool) -> list[Message]:
    return [replace(one, trained=trained if one.role == "assistant" else None) for one in messages]
