"""Signs of a model gone wrong: found in broken text, and not in real text."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.evaluate.signs import Answered, nats_bound, repeated_share, signs_in

SHARED = Path(__file__).parents[3] / "shared" / "data"
SMOLLM_NATS = math.log(49152)


def answered(text: str = "A sound answer.", *, nats: float | None = 3.0, finished: bool = True) -> Answered:
    """By bytes as tokens."""
    ids = list(text.encode())
    return Answered(text, len(ids), finished, repeated_share(ids), nats)


def found(*answers: Answered, ends_expected: bool = True) -> set[str]:
    return signs_in(answers, vocabulary_nats=SMOLLM_NATS, ends_expected=ends_expected)


def test_the_share_is_of_grams_that_were_there_already() -> None:
    """abcabcabc has six 4-grams, of which abca, bcab and cabc are distinct."""
    assert repeated_share(list(b"abcabcabc")) == 0.5
    assert repeated_share(list(b"abcdefgh")) == 0
    assert repeated_share(list(b"abc")) == 0
    assert repeated_share([7] * 64) == pytest.approx(60 / 61)


@given(st.lists(st.integers(0, 3), max_size=50))
def test_a_text_said_twice_repeats_at_least_half_of_what_it_can(ids: list[int]) -> None:
    twice = repeated_share(ids * 2)
    assert 0 <= repeated_share(ids) <= 1
    if len(ids) > 3:
        assert twice >= (len(ids) - 3) / (2 * len(ids) - 3) - 1e-12


@pytest.mark.parametrize("text", ["the the the the " * 8, "- " * 32, "I can help you with that. " * 8, "0" * 64])
def test_loops_are_seen(text: str) -> None:
    assert found(answered(text)) == {"repeats"}


@pytest.mark.parametrize("name", ["alpaca_en.jsonl:output", "gsm8k_test.jsonl:answer", "xquad_de.jsonl:context"])
def test_real_text_has_no_sign(name: str) -> None:
    """By bytes, of which far fewer are distinct than of tokens, so that more repeats by chance."""
    file, column = name.split(":")
    if not SHARED.exists():
        pytest.skip("the shared data is not here")
    rows = [json.loads(line)[column] for line in (SHARED / file).read_text(encoding="utf-8").split("\n")[:200] if line]
    assert not found(*(answered(text[:256]) for text in rows))
    assert sum(bool(found(answered(text[:256]))) for text in rows if text.strip()) <= 0.01 * len(rows)


def test_what_real_and_broken_text_took_lies_on_both_sides_of_the_bound() -> None:
    """Nats a token by SmolLM2-135M: the most of real texts, in German; the least of shuffled tokens, and of random."""
    assert 5.4 < nats_bound(SMOLLM_NATS) < 8.6 < 12.5
    draw = np.random.default_rng(0)
    salad = "".join(chr(code) for code in draw.integers(33, 127, 64))
    assert found(answered(salad, nats=12.5)) == {"gibberish"}
    assert found(answered(salad, nats=5.4)) == set()
    assert found(answered(salad, nats=None)) == set(), "of a model without an adapter nobody can tell"
    assert found(answered("Hm.", nats=12.5)) == set(), "too short to say"


def test_an_answer_without_text_and_one_without_end_are_seen() -> None:
    assert found(answered(" \n")) == {"empty"}
    assert found(answered(finished=False)) == {"never ends"}
    assert found(answered(finished=False), ends_expected=False) == set()


def test_most_answers_decide() -> None:
    empty, sound = answered(""), answered()
    assert found(empty, empty, sound) == {"empty"}
    assert found(empty, sound) == set()
    assert found() == set()
