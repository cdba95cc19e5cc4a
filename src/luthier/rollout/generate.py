"""Answers to conversations: encoded by the function that training uses, answered by an engine, read as text."""

from collections.abc import Iterator

import numpy as np

from luthier.data.examples import Chat
from luthier.data.masks import encode_prompt
from luthier.errors import DataError
from luthier.models.load import Model
from luthier.rollout.engine import LocalEngine
from luthier.rollout.requests import Engine, Request, Sample, Sampling
from luthier.rollout.scoring import Failure

__all__ = ["answer", "answers", "request_for", "samples"]

_AT_ONCE = 64  # conversations whose answers are waited for together


def answer(model: Model, chat: Chat, sampling: Sampling) -> str:
    """The assistant's next turn. Raises DataError for a conversation that leaves no room for it."""
    return samples(LocalEngine(model), model, chat, sampling, 1)[0].text


def answers(model: Model, chats: list[Chat], sampling: Sampling) -> Iterator[str]:
    """One answer after the other; conversations do not influence each other. Raises DataError as `answer` does."""
    engine = LocalEngine(model)
    for first in range(0, len(chats), _AT_ONCE):
        requests = [request_for(model, chat) for chat in chats[first : first + _AT_ONCE]]
        for found in engine.sample(requests, sampling):
            yield _whole(found)[0].text


def samples(engine: Engine, model: Model, chat: Chat, sampling: Sampling, count: int) -> tuple[Sample, ...]:
    """So many next turns of the assistant, drawn together. Raises DataError as `answer` does."""
    return _whole(engine.sample([request_for(model, chat, count=count)], sampling)[0])


def request_for(model: Model, chat: Chat, *, count: int = 1, seed: int = 0) -> Request:
    """What is asked of an engine to have this conversation answered."""
    return Request(np.array(encode_prompt(chat, model.tokenizer), dtype=np.int32), count, seed)


def _whole(found: tuple[Sample, ...] | Failure) -> tuple[Sample, ...]:
    if isinstance(found, Failure):
        raise DataError(f"the conversation cannot be answered: {found.reason} ({found.detail}); shorten it")
    return found
