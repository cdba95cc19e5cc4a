"""What each kind of server is sent, and how its documented replies are read."""

import copy
from collections.abc import Iterator
from functools import reduce
from operator import getitem
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.rollout.requests import Sampling
from luthier.rollout.server_kinds import NO_ANSWER, SERVERS, Asked

CHOSEN = Sampling(9, 0.5, top_p=0.9, top_k=3, min_p=0.1, repetition_penalty=1.2, stop=("x",))


def sent(kind: Any, *seeds: int, adapter: str | None = None, sampling: Sampling = CHOSEN) -> dict[str, Any]:
    """What a server is asked for one answer of each seed; the token 7 ends an answer."""
    return SERVERS[kind].body(Asked("base", adapter, [1, 5], list(seeds), (7,), sampling))


def test_vllm_is_sent_all_that_decides_the_draws() -> None:
    """What is left out would be decided by the model's generation_config.json."""
    chosen = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.2, "stop": ["x"]}
    asked = {"model": "base", "prompt": [1, 5], "n": 2, "seed": 30, "max_tokens": 9, "stop_token_ids": [7]}
    told = {"logprobs": 1, "return_token_ids": True, "return_tokens_as_token_ids": True}
    assert sent("vllm", 30, 31) == chosen | asked | told | {"include_stop_str_in_output": True}


def test_sglang_is_sent_the_prompt_once_for_each_seed() -> None:
    chosen = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.2, "stop": ["x"]}
    drawn = chosen | {"max_new_tokens": 9, "stop_token_ids": [7]}
    assert sent("sglang", 30, 31, adapter="mine-1") == {
        "input_ids": [[1, 5], [1, 5]],
        "sampling_params": [drawn | {"sampling_seed": 30}, drawn | {"sampling_seed": 31}],
        "return_logprob": True,
        "lora_path": "mine-1",
    }


def test_llama_cpp_is_sent_its_own_words_and_the_order_of_its_samplers() -> None:
    chosen = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "repeat_penalty": 1.2, "stop": ["x"]}
    asked = {"model": "base", "prompt": [1, 5], "seed": 30, "n_predict": 9, "repeat_last_n": -1}
    told = {"n_probs": 1, "return_tokens": True}
    samplers = ["penalties", "temperature", "top_k", "top_p", "min_p"]
    assert sent("llama_cpp", 30) == chosen | asked | told | {"samplers": samplers}


def test_a_server_of_no_known_kind_is_sent_what_all_of_them_know() -> None:
    asked = {"model": "base", "prompt": [1, 5], "n": 2, "seed": 30, "max_tokens": 9, "temperature": 0.5, "top_p": 0.9}
    assert sent("openai", 30, 31) == asked


@pytest.mark.parametrize("kind", ["vllm", "llama_cpp"])
def test_no_cut_is_said_so_and_not_left_out(kind: str) -> None:
    body = sent(kind, 1, sampling=Sampling(9, 1.0))
    assert (body["top_k"], body["top_p"], body["min_p"], body["stop"]) == (-1, 1.0, 0.0, [])


@pytest.mark.parametrize(
    ("kind", "mode", "sampling", "told"),
    [
        ("vllm", "raw_logprobs", {"temperature": 1.0, "top_k": 5, "repetition_penalty": 1.2}, True),
        ("vllm", "raw_logprobs", {"temperature": 0.0}, True),
        ("vllm", "raw_logprobs", {"temperature": 0.7}, False),
        ("vllm", "processed_logprobs", {"temperature": 0.7}, True),
        ("vllm", "processed_logprobs", {"temperature": 0.7, "top_p": 0.9}, False),
        ("vllm", "processed_logprobs", {"temperature": 1.0, "repetition_penalty": 1.2}, False),
        ("sglang", "raw_logprobs", {"temperature": 0.7, "top_p": 0.9, "min_p": 0.1}, True),
        ("sglang", "raw_logprobs", {"temperature": 0.7, "repetition_penalty": 1.2}, False),
        ("llama_cpp", "raw_logprobs", {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2}, True),
        ("llama_cpp", "raw_logprobs", {"temperature": 0.7}, False),
        ("openai", "raw_logprobs", {"temperature": 1.0}, False),
    ],
)
def test_log_probabilities_are_the_contracts_where_a_server_takes_them_so(
    kind: Any, mode: Any, sampling: dict[str, Any], told: bool
) -> None:
    """The contract's: behind the temperature, before everything that cuts. vLLM's raw ones are before both."""
    assert SERVERS[kind].tells(Sampling(9, **sampling), mode) == told


def test_tokens_of_an_older_vllm_are_read_from_its_words() -> None:
    logprobs = {"tokens": ["token_id:70", "token_id:7"], "token_logprobs": [-0.5, -0.25]}
    (drawn,) = SERVERS["vllm"].read({"choices": [{"text": "a", "finish_reason": "stop", "logprobs": logprobs}]})
    assert drawn.token_ids is not None
    assert drawn.token_ids.tolist() == [70, 7]
    assert np.array_equal(drawn.logprobs, np.float32([-0.5, -0.25]))


def test_words_that_are_no_numbers_of_tokens_are_no_tokens() -> None:
    logprobs = {"tokens": ["a", "token_id:7"], "token_logprobs": [-0.5, -0.25]}
    (drawn,) = SERVERS["vllm"].read({"choices": [{"text": "a", "finish_reason": "stop", "logprobs": logprobs}]})
    assert drawn.token_ids is None


def test_llama_cpp_tells_too_few_log_probabilities_of_an_answer_that_a_stop_text_ended() -> None:
    told = [{"id": token, "logprob": -0.5} for token in (70, 71)]
    reply = {"content": "ab", "tokens": [70, 71, 72], "stop_type": "word", "completion_probabilities": told}
    (drawn,) = SERVERS["llama_cpp"].read(reply)
    assert drawn.token_ids is not None
    assert (drawn.finish, drawn.token_ids.tolist(), len(drawn.logprobs)) == ("stop", [70, 71, 72], 2)


def test_a_probability_that_a_server_has_rounded_to_nothing_stays_finite() -> None:
    """llama.cpp says the lowest float32 for the logarithm of 0."""
    told = [{"id": 70, "logprob": -3.4028234663852886e38}]
    reply = {"content": "a", "tokens": [70], "stop_type": "limit", "completion_probabilities": told}
    (drawn,) = SERVERS["llama_cpp"].read(reply)
    assert np.isfinite(drawn.logprobs).all()


VLLM_LOGPROBS = {"tokens": ["token_id:70", "token_id:7"], "token_logprobs": [-0.5, -0.25], "top_logprobs": [None, None]}
META = {"finish_reason": {"type": "stop", "matched": 7}, "output_token_logprobs": [[-0.5, 70, None], [-0.25, 7, None]]}
TOLD = [{"id": 70, "token": "a", "logprob": -0.5}, {"id": 7, "token": "", "logprob": -0.25}]
CHOICE = {"index": 0, "text": "a", "finish_reason": "stop"}
REPLIES: dict[str, Any] = {
    "vllm": {"choices": [{**CHOICE, "token_ids": [70, 7], "logprobs": VLLM_LOGPROBS}]},
    "sglang": [{"text": "a", "output_ids": [70, 7], "meta_info": META}],
    "llama_cpp": {"content": "a", "tokens": [70, 7], "stop_type": "eos", "completion_probabilities": TOLD},
    "openai": {"choices": [{**CHOICE, "logprobs": None}]},
}


def places_in(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where values stand in JSON, as paths of keys and numbers."""
    yield here
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places_in(inner, (*here, key))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(
    kind=st.sampled_from(sorted(REPLIES)), number=st.integers(0, 100), instead=JSON | st.just(10**400) | st.just([0.5])
)
def test_whatever_stands_in_a_reply_is_an_answer_or_none(kind: Any, number: int, instead: Any) -> None:
    """One value of a faithful reply is replaced by any other JSON."""
    reply = {"": copy.deepcopy(REPLIES[kind])}
    places = list(places_in(reply))[1:]
    *path, last = places[number % len(places)]
    reduce(getitem, path, reply)[last] = instead
    try:
        answers = SERVERS[kind].read(reply[""])
    except NO_ANSWER:
        return
    for drawn in answers:
        assert isinstance(drawn.text, str)
        assert drawn.token_ids is None or (drawn.token_ids.ndim, drawn.token_ids.dtype) == (1, np.int64)
        assert drawn.logprobs is None or (np.isnan(drawn.logprobs) | (drawn.logprobs <= 0)).all()


@pytest.mark.parametrize("kind", ["vllm", "sglang", "llama_cpp"])
def test_a_faithful_reply_is_read(kind: Any) -> None:
    (drawn,) = SERVERS[kind].read(REPLIES[kind])
    assert (drawn.text, drawn.finish, drawn.token_ids.tolist(), drawn.logprobs.tolist()) == (
        "a",
        "stop",
        [70, 7],
        [-0.5, -0.25],
    )
