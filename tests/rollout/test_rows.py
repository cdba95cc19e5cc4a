"""Answers in the making end where they should, whoever computes their logits."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from luthier.errors import ModelError
from luthier.rollout.requests import Request, Sample, Sampling
from luthier.rollout.rows import Row, Writer, group_of

END, SIZE = 257, 258
PROMPT = np.array([5, 6, 6], dtype=np.int32)


def said(byte_tokenizer: PreTrainedTokenizerFast, text: str, sampling: Sampling) -> Sample:
    """The answer of who wants to say this text, and then nothing but its end."""
    writer = Writer(byte_tokenizer, sampling)
    (row,) = group_of(Request(PROMPT), sampling.max_new_tokens, sampling).rows
    for token in wanted(byte_tokenizer, text):
        if row.ended:
            break
        writer.extend([row], torch.zeros(1, SIZE).index_fill_(1, torch.tensor([token]), 50.0))
    return writer.sample(row)


def wanted(byte_tokenizer: PreTrainedTokenizerFast, text: str) -> Iterator[int]:
    yield from byte_tokenizer.encode(text, add_special_tokens=False)
    while True:
        yield END


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ((), "Hello, how are 🎻🎶🎼🎵🎹🎺🎷🥁🎸🎤 today?"),
        (("how",), "Hello, how"),
        (("o, h",), "Hello, h"),
        (("today", " a"), "Hello, how a"),
        (("🎻🎶🎼🎵🎹🎺🎷🥁🎸🎤",), "Hello, how are 🎻🎶🎼🎵🎹🎺🎷🥁🎸🎤"),
        (("🎶",), "Hello, how are 🎻🎶"),
        (("are today",), "Hello, how are 🎻🎶🎼🎵🎹🎺🎷🥁🎸🎤 today?"),
    ],
)
def test_an_answer_ends_with_a_text_of_any_letters(
    byte_tokenizer: PreTrainedTokenizerFast, stop: tuple[str, ...], expected: str
) -> None:
    """Each byte is a token, so that a text may need four tokens for a letter."""
    whole = "Hello, how are 🎻🎶🎼🎵🎹🎺🎷🥁🎸🎤 today?"
    sample = said(byte_tokenizer, whole, Sampling(max_new_tokens=100, stop=stop))
    assert sample.finished
    assert sample.text == expected
    by_token = [END] if expected == whole else []
    assert sample.token_ids.tolist() == byte_tokenizer.encode(expected, add_special_tokens=False) + by_token


def test_an_answer_that_is_as_long_as_it_may_be_is_not_finished(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    short, exact, ended = (said(byte_tokenizer, "abc", Sampling(max_new_tokens=n)) for n in (2, 3, 4))
    assert [(one.text, one.finished, len(one.token_ids)) for one in (short, exact, ended)] == [
        ("ab", False, 2),
        ("abc", False, 3),
        ("abc", True, 4),
    ]


def test_a_row_that_has_ended_takes_nothing_more(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    """Beside one that goes on; not even logits that are no numbers."""
    sampling = Sampling(max_new_tokens=5, temperature=1.0)
    writer, rows = Writer(byte_tokenizer, sampling), group_of(Request(PROMPT, 2), 5, sampling).rows
    rows[0].finished = True
    logits = torch.zeros(2, SIZE)
    logits[0] = torch.nan
    writer.extend(rows, logits)
    assert [len(row.tokens) for row in rows] == [0, 1]
    with pytest.raises(ModelError, match="not numbers"):
        writer.extend(rows[::-1], logits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_penalty_sees_prompt_and_answer(byte_tokenizer: PreTrainedTokenizerFast, temperature: float) -> None:
    """6 stands in the prompt and 9 has just been said: of 6, 9 and 7, 7 is likeliest then. Its log-probability is that
    of the logits as they were.
    """
    sampling = Sampling(max_new_tokens=5, temperature=temperature, repetition_penalty=9.0)
    writer, (row,) = Writer(byte_tokenizer, sampling), group_of(Request(PROMPT), 5, sampling).rows
    row.tokens, row.logprobs = [9], [0.0]
    logits = torch.full((1, SIZE), -50.0)
    logits[0, [6, 9, 7]] = torch.tensor([10.0, 10.0, 9.9])
    expected = float(torch.log_softmax(logits, -1)[0, 7])
    writer.extend([row], logits)
    assert row.tokens == [9, 7]
    assert row.logprobs[1] == pytest.approx(expected, abs=1e-6)


def draws(request: Request, sampling: Sampling, most: int = 6) -> list[list[float]]:
    return [row.uniforms.tolist() for row in group_of(request, most, sampling).rows]


def test_draws_are_of_both_seeds_and_the_place_alone() -> None:
    """Negative seeds and large ones too; a longer answer's begin as a shorter one's."""
    some = draws(Request(PROMPT, 3, 1), Sampling(seed=2))
    assert some == draws(Request(PROMPT[:1], 5, 1), Sampling(seed=2))[:3]
    assert [one[:4] for one in some] == draws(Request(PROMPT, 3, 1), Sampling(seed=2), most=4)
    others = [Request(PROMPT, 3, 2), Request(PROMPT, 3, -1), Request(PROMPT, 3, 2**70)]
    everything = some + [one for request in others for one in draws(request, Sampling(seed=2))]
    everything += draws(Request(PROMPT, 3, 1), Sampling(seed=-2))
    assert len({tuple(one) for one in everything}) == 15
    assert all(0 <= number < 1 for one in everything for number in one)


def test_a_group_without_answers_has_no_rows() -> None:
    assert group_of(Request(PROMPT, 0), 6, Sampling()).rows == list[Row]()
