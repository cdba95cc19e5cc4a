"""Rewards: one number for a conversation, from a reward model, higher for the better answer.

A conversation is read whole, as its chat template writes it and as transformers' `apply_chat_template` gives it to
others, and its reward is read off its last token. So the folder of a reward model says the same in other tools.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luthier.adapters.peft_format import read_adapter
from luthier.data.batches import collate, passes
from luthier.data.conversations import turns_of
from luthier.data.examples import Chat, Origin, Steps
from luthier.data.pairs import encode_steps
from luthier.data.sequences import TokenSequence
from luthier.data.templates import encode_whole
from luthier.errors import DataError, ModelError
from luthier.models.adapted import put_on
from luthier.models.heads import score_rewards, trains_head, with_head
from luthier.models.load import Model, config_of, gives_rewards, load_either
from luthier.models.sources import resolve
from luthier.recipe.training import DType

__all__ = ["load_reward", "rewards", "step_rewards"]

ChatLike = Chat | Sequence[Mapping[str, Any]]


def load_reward(
    name: str,
    *,
    adapter: Path | str | None = None,
    rank: int | None = None,
    dtype: DType = "fp32",
    device: str | torch.device | None = None,
    attention: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Model:
    """The reward model of this name, in evaluation mode: a folder or a hub id, with transformers' sequence
    classification in it. All else as for `load`.

    adapter: one that was trained with its head, on the language model of this name. rank: the one to serve it at, of a
    type that has several.
    Raises ModelError for a language model without such an adapter, for a classifier with several labels, and what
    `load` and `put_on` raise.
    """
    saved = None if adapter is None else read_adapter(Path(adapter), rank=rank)
    config = config_of(resolve(name, environment))
    if not gives_rewards(config) and (saved is None or not trains_head(saved.settings)):
        given = f" and {saved.folder} has no head" if saved else ""
        raise ModelError(
            f"{name}: is a {config.model_type} language model, which gives no rewards{given}; train a reward model "
            "from it with `luthier reward`"
        )
    model = load_either(name, dtype=dtype, device=device, attention=attention, environment=environment)
    if saved is not None:
        model = with_head(model, seed=0)  # its values are the adapter's in a moment
        put_on(model, saved)
    return model


@torch.no_grad()
def rewards(model: Model, chats: Sequence[ChatLike], *, batch_tokens: int = 4096) -> list[float]:
    """The reward of each conversation, in their order; longer ones are as many tokens as they are.

    chats: messages with `role` and `content`, or `Chat`s. batch_tokens: how many are computed at once.
    Raises DataError, naming the conversation by its number, where one cannot be read.
    """
    sequences = [_sequence(model, chat, number) for number, chat in enumerate(chats, start=1)]
    found = torch.zeros(len(sequences))
    for members in passes(sequences, batch_tokens):
        found[members] = score_rewards(model, collate([sequences[i] for i in members])).float().cpu()
    values: list[float] = found.tolist()
    return values


@torch.no_grad()
def step_rewards(model: Model, prompt: ChatLike, steps: Sequence[str]) -> list[float]:
    """Of a process reward model, the reward of each step of an answer: s(r) is how likely the step is right.

    prompt: the messages before the answer. Raises DataError where it cannot be read, or no step is given.
    """
    asked = prompt if isinstance(prompt, Chat) else Chat(tuple(turns_of("messages", list(prompt))))
    if not steps:
        raise DataError("there are no steps; give at least one")
    example = Steps(asked.messages, tuple(steps), (True,) * len(steps), asked.tools)
    batch = collate([encode_steps(example, Origin("steps", 1), model.tokenizer)]).to(model.device)
    found: list[float] = score_rewards(model, batch, batch.target_index + 1).float().tolist()
    return found


def _sequence(model: Model, chat: ChatLike, number: int) -> TokenSequence:
    """Without padding tokens at its end, which transformers would not count: others' reward models pad with one that
    ends a turn.
    """
    try:
        messages = chat if isinstance(chat, Chat) else Chat(tuple(turns_of("messages", list(chat))))
        ids = np.asarray(encode_whole(messages, model.tokenizer), dtype=np.int32)
    except DataError as error:
        raise type(error)(f"conversation {number}: {error}") from error
    padding = model.config.get_text_config().pad_token_id
    counted = np.flatnonzero(ids != (-1 if padding is None else padding))
    ids = ids[: counted.max(initial=0) + 1]
    return TokenSequence(ids, np.zeros(len(ids), dtype=np.bool_), Origin("conversations", number))
