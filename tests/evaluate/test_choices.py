"""Choices are compared by their log-probability a character, as transformers' own logits give it."""

from pathlib import Path

import pytest
import torch

from luthier.data.examples import Origin
from luthier.data.questions import Question, encode_question
from luthier.evaluate.choices import answered_rightly, likeliest
from luthier.models.load import load

WORDS = ["a", "two words", "something that is longer", "b", "xyz"]


def test_a_long_choice_is_not_at_a_disadvantage() -> None:
    assert likeliest([-4.0, -6.0], [2, 4]) == 1
    assert likeliest([-4.0, -9.0], [2, 4]) == 0
    assert likeliest([-4.0, float("nan")], [2, 4]) is None


@pytest.mark.parametrize("micro_batch_tokens", [None, 64])
def test_what_is_right_follows_from_the_logits_of_each_choice_by_itself(
    chat_model: Path, micro_batch_tokens: int | None
) -> None:
    """acc_norm of lm-evaluation-harness, worked out the long way: one forward pass a choice, over its characters."""
    model = load(str(chat_model), dtype="fp32")
    rows = [
        Question(f"What is {i}?", tuple(WORDS[i % 3 :][:2] + WORDS[-2:]), i % 4, Origin("quiz", i)) for i in range(12)
    ]
    expected = []
    for row in rows:
        scores = []
        for choice in row.choices:
            start = f"Question: {row.question}\nAnswer:"
            ids = torch.tensor([model.tokenizer.encode(f"{start} {choice}", add_special_tokens=False)])
            first = len(model.tokenizer.encode(start, add_special_tokens=False))
            logprobs = model.network(input_ids=ids).logits.detach().log_softmax(-1)[0, :-1]
            picked = logprobs.gather(1, ids[0, 1:, None])[first - 1 :]
            scores.append(float(picked.sum()) / len(choice))
        expected.append(scores.index(max(scores)) == row.answer)
    questions = [encode_question(row, model.tokenizer) for row in rows]
    lengths = [tuple(map(len, row.choices)) for row in rows]
    found = answered_rightly(model.network, questions, lengths, micro_batch_tokens)
    assert found == expected
    assert {True, False} == set(found)
