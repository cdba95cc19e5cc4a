"""The reward of a conversation is what transformers gives to the same messages, with its template and padding."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from luthier.data.batches import collate
from luthier.data.examples import Chat, Message, Origin
from luthier.data.sequences import TokenSequence
from luthier.data.templates import encode_whole
from luthier.errors import DataError, NetworkError
from luthier.models.heads import with_head
from luthier.models.load import Model, load
from luthier.models.rewards import load_reward, rewards
from luthier.models.save import save
from luthier.models.score import hidden_states
from luthier.models.sources import resolve

Factory = Callable[..., PreTrainedModel]

CHATS = [
    [{"role": "user", "content": "How high is it?"}, {"role": "assistant", "content": answer}]
    for answer in ("8,849 metres.", "High.", "I cannot say how high it is, for nobody told me what it is.")
]
UNENDED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@torch.no_grad()
def theirs(place: Path) -> list[float]:
    network = AutoModelForSequenceClassification.from_pretrained(place)
    tokenizer = AutoTokenizer.from_pretrained(place)
    batch = tokenizer.apply_chat_template(CHATS, padding=True, return_tensors="pt", return_dict=True)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    values: list[float] = network(**inputs).logits.squeeze(-1).tolist()
    return values


def test_rewards_are_those_of_transformers_on_the_saved_folder(model: Model, tmp_path: Path) -> None:
    place = save(with_head(model, seed=0), tmp_path / "saved")
    found = rewards(load_reward(str(place)), CHATS)
    assert found == pytest.approx(theirs(place), abs=1e-5)
    assert len({round(value, 3) for value in found}) == 3


def test_neither_the_cut_nor_the_order_matters(model: Model) -> None:
    reward = with_head(model, seed=0)
    expected = rewards(reward, CHATS)
    assert rewards(reward, CHATS, batch_tokens=1) == pytest.approx(expected, abs=1e-6)
    assert rewards(reward, CHATS[::-1]) == pytest.approx(expected[::-1], abs=1e-6)
    assert rewards(reward, []) == []
    chat = Chat(tuple(Message(turn["role"], turn["content"]) for turn in CHATS[1]))
    assert rewards(reward, [chat]) == pytest.approx(expected[1:2], abs=1e-6)


def test_others_models_that_pad_with_the_end_of_a_turn_are_read_as_transformers_reads_them(
    model: Model, tmp_path: Path
) -> None:
    """There the reward stands at the token before the end of the last turn."""
    model.tokenizer.chat_template = UNENDED
    reward = with_head(model, seed=0)
    reward.tokenizer.pad_token = "<|im_end|>"
    reward.config.pad_token_id = reward.tokenizer.pad_token_id
    place = save(reward, tmp_path / "saved")
    assert rewards(load_reward(str(place)), CHATS) == pytest.approx(theirs(place), abs=1e-5)


def test_a_conversation_that_cannot_be_read_is_named_by_its_number(model: Model) -> None:
    with pytest.raises(DataError, match="conversation 2: "):
        rewards(with_head(model, seed=0), [CHATS[0], [{"role": "user"}]])


def pairs() -> list[list[Chat]]:
    """Questions, each with a polite and a rude answer."""
    questions = ("Where is the station?", "What is bread made of?", "Who wrote Emma?", "Is it late?", "Why is it red?")
    answers = ("Certainly, I will gladly help you with that.", "Go away, you fool, nobody likes you.")
    return [[Chat((Message("user", q), Message("assistant", a))) for a in answers] for q in questions]


@pytest.mark.slow
def test_smollm2_learns_which_of_two_answers_is_better(tmp_path: Path) -> None:
    """Only the head is trained, on three pairs; it is right on the two others, and so is what is loaded again. That to
    1e-5: the same sums over weights that lie otherwise in memory.
    """
    try:
        resolve("smollm2-135m")
    except NetworkError as error:
        pytest.skip(str(error))
    model = with_head(load("smollm2-135m"), seed=0)
    ids = [np.asarray(encode_whole(chat, model.tokenizer), dtype=np.int32) for pair in pairs()[:3] for chat in pair]
    batch = collate([TokenSequence(one, np.zeros(len(one), dtype=np.bool_), Origin("pairs", 1)) for one in ids])
    with torch.no_grad():
        features = hidden_states(model.network, batch)[batch.last_index]
    optimizer = torch.optim.Adam([model.network.score.weight], lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        better, worse = model.network.score(features).view(3, 2).unbind(-1)
        (-logsigmoid(better - worse).mean()).backward()
        optimizer.step()
    place = save(model, tmp_path / "saved")
    for pair in pairs()[3:]:
        better_reward, worse_reward = rewards(model, pair)
        assert better_reward > worse_reward
        assert rewards(load_reward(str(place)), pair) == pytest.approx([better_reward, worse_reward], rel=1e-5)
