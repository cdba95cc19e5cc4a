"""Conversations are asked as training encodes them, and answered one by one as all together."""

from pathlib import Path

import numpy as np
import pytest

import luthier
from luthier.data.examples import Chat, Message
from luthier.data.masks import encode_prompt
from luthier.errors import DataError
from luthier.models.load import Model
from luthier.rollout import generate
from luthier.rollout.engine import LocalEngine
from luthier.rollout.generate import answer, answers, request_for, samples
from luthier.rollout.requests import Sampling

DRAWN = Sampling(max_new_tokens=6, temperature=1.0)


@pytest.fixture(scope="module")
def model(chat_model: Path) -> Model:
    """With weights so large that answers depend on what was asked."""
    loaded = luthier.load(str(chat_model))
    for parameter in loaded.network.parameters():
        parameter.data *= 10
    return loaded


def chat(text: str) -> Chat:
    return Chat((Message("system", "Be brief."), Message("user", text)))


def test_a_request_is_the_conversation_as_it_is_encoded_for_training(model: Model) -> None:
    request = request_for(model, chat("What is 2+2? <|im_end|>"), count=3, seed=7)
    assert request.prompt_ids.tolist() == encode_prompt(chat("What is 2+2? <|im_end|>"), model.tokenizer)
    assert request.prompt_ids.dtype == np.int32
    assert (request.count, request.seed) == (3, 7)
    whole = model.tokenizer.decode(request.prompt_ids.tolist())
    assert whole.endswith("<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("sampling", [DRAWN, Sampling(max_new_tokens=6)], ids=["drawn", "greedy"])
def test_many_conversations_are_answered_as_each_alone(
    model: Model, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, however many are waited for together."""
    chats = [chat(f"Number {i}: " + "x" * i) for i in range(7)]
    expected = [answer(model, one, sampling) for one in chats]
    assert len(set(expected)) > 2
    assert list(answers(model, chats, sampling)) == expected
    monkeypatch.setattr(generate, "_AT_ONCE", 3)
    assert list(answers(model, chats, sampling)) == expected
    assert list(answers(model, [], sampling)) == []


def test_answers_come_as_soon_as_those_waited_for_together_are_there(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three at a time: the first comes before the fourth conversation, which has no room, is looked at."""
    monkeypatch.setattr(generate, "_AT_ONCE", 3)
    chats = [*(chat(str(i)) for i in range(3)), chat("x" * 3000)]
    found = answers(model, chats, DRAWN)
    assert [next(found) for _ in range(3)] == [answer(model, one, DRAWN) for one in chats[:3]]
    with pytest.raises(DataError, match=r"cannot be answered: prompt too long \(3\d{3} tokens for a context of 2048\)"):
        next(found)


def test_several_answers_to_one_conversation_are_drawn_together(model: Model) -> None:
    found = samples(LocalEngine(model), model, chat("Say something."), DRAWN, 4)
    assert len({sample.text for sample in found}) > 1
    assert found[0].text == answer(model, chat("Say something."), DRAWN)
    assert all(len(sample.token_ids) == len(sample.logprobs) <= 6 for sample in found)


def test_a_conversation_without_room_is_an_error(model: Model) -> None:
    for ask in (answer, lambda *given: samples(LocalEngine(model), *given, 1)):
        with pytest.raises(DataError, match=r"prompt too long .* shorten it"):
            ask(model, chat("x" * 3000), DRAWN)
