"""Answers to conversations, with the very token ids that training saw.

The prompt is encoded by the function that training uses, and decoding stops at the tokens that training taught to end
a turn. Decoding itself is transformers'.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from luthier.data.examples import Chat
from luthier.data.masks import encode_prompt
from luthier.data.templates import stop_token_ids
from luthier.models.load import Model
from luthier.models.score import evaluating

__all__ = ["Answer", "Sampling", "answer", "answers", "samples"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen; temperature 0 takes the most likely one."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 42


@dataclass(frozen=True, slots=True)
class Answer:
    """finished: it ended by itself, and not because it was as long as it may be."""

    text: str
    finished: bool


def answer(model: Model, chat: Chat, sampling: Sampling) -> str:
    """The assistant's next turn."""
    return samples(model, chat, sampling, 1)[0].text


def samples(model: Model, chat: Chat, sampling: Sampling, count: int) -> list[Answer]:
    """So many next turns of the assistant, drawn together."""
    prompt = encode_prompt(chat, model.tokenizer)
    stops = stop_token_ids(model.tokenizer)
    return [_read(model, ids, stops) for ids in _generate(model, prompt, sampling, stops, count)]


def _read(model: Model, ids: list[int], stops: set[int]) -> Answer:
    """What stands before the first token that ends the turn."""
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    text: str = model.tokenizer.decode(ids[:end])
    return Answer(text.strip(), end < len(ids))


def answers(model: Model, chats: list[Chat], sampling: Sampling) -> Iterator[str]:
    """One answer after the other; conversations do not influence each other."""
    for chat in chats:
        yield answer(model, chat, sampling)


@torch.inference_mode()
def _generate(model: Model, prompt: list[int], sampling: Sampling, stops: set[int], count: int) -> list[list[int]]:
    sampled = sampling.temperature > 0
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampled,
        eos_token_id=sorted(stops),
        pad_token_id=min(stops),
        repetition_penalty=1.0,
        **({"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampled else {}),
    )
    torch.manual_seed(sampling.seed)
    inputs = torch.tensor([prompt] * count, device=model.device)
    with evaluating(model.network):
        output = model.network.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=config)
    generated: list[list[int]] = output[:, len(prompt) :].tolist()
    return generated
