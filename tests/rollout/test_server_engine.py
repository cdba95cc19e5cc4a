"""Rollouts by servers: the tokens are those that were drawn, and whatever a server does, only its own prompt fails."""

import json
import logging
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from luthier.errors import RecipeError
from luthier.recipe.rollout_servers import RolloutServer
from luthier.rollout.requests import Request, Sample, Sampling
from luthier.rollout.scoring import Failure
from luthier.rollout.server_engine import ServerEngine, server_engine

KEY = "sk-very-secret-0123456789"
WARM = Sampling(max_new_tokens=8, temperature=1.0)
KINDS = ("vllm", "sglang", "llama_cpp")

Play = Callable[[dict[str, Any]], Any]


class FakeModel:
    """Draws letters and an end, all decided by the seed, and answers as each kind of server does."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, answer: Any) -> None:
        self.tokenizer, self.answer, self.end = tokenizer, answer, tokenizer.eos_token_id

    def draw(self, seed: int, most: int) -> tuple[list[int], list[float], str]:
        """Tokens, their log-probabilities, and why they end: one to eight letters, and an end where there is room."""
        choose = random.Random(seed)
        letters = self.tokenizer.encode("".join(choose.choices("abcdef", k=choose.randint(1, 8))))
        ids = [*letters, self.end][:most]
        return ids, [-choose.random() for _ in ids], "stop" if ids[-1] == self.end else "length"

    def text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def vllm(self, request: dict[str, Any]) -> Any:
        return self.json(
            {"object": "text_completion", "choices": [self.choice(request, i) for i in range(request["n"])]}
        )

    def choice(self, request: dict[str, Any], index: int) -> dict[str, Any]:
        ids, logs, finish = self.draw(request["seed"] + index, request["max_tokens"])
        words = [f"token_id:{token}" for token in ids]
        logprobs = {"tokens": words, "token_logprobs": logs, "text_offset": [], "top_logprobs": []}
        return {"index": index, "text": self.text(ids), "finish_reason": finish, "token_ids": ids, "logprobs": logprobs}

    def openai(self, request: dict[str, Any]) -> Any:
        choices = [self.choice(request, i) for i in range(request["n"])]
        return self.json({"choices": [{**c, "token_ids": None, "logprobs": None} for c in reversed(choices)]})

    def sglang(self, request: dict[str, Any]) -> Any:
        return self.json([self.generated(asked) for asked in request["sampling_params"]])

    def generated(self, asked: dict[str, Any]) -> dict[str, Any]:
        ids, logs, finish = self.draw(asked["sampling_seed"], asked["max_new_tokens"])
        told = [[log, token, None] for log, token in zip(logs, ids, strict=True)]
        meta = {"finish_reason": {"type": finish}, "output_token_logprobs": told, "completion_tokens": len(ids)}
        return {"text": self.text(ids), "output_ids": ids, "meta_info": meta}

    def llama_cpp(self, request: dict[str, Any]) -> Any:
        ids, logs, finish = self.draw(request["seed"], request["n_predict"])
        told = [{"id": token, "logprob": log, "top_logprobs": []} for token, log in zip(ids, logs, strict=True)]
        said = {"content": self.text(ids), "tokens": ids, "completion_probabilities": told, "truncated": False}
        return self.json({**said, "stop_type": {"stop": "eos", "length": "limit"}[finish]})

    def json(self, value: Any) -> Any:
        return self.answer([json.dumps(value).encode()])


PATHS = {"vllm": "/v1/completions", "openai": "/v1/completions", "sglang": "/generate", "llama_cpp": "/completion"}


@pytest.fixture(scope="session")
def tokenizer(chat_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(chat_model)


@pytest.fixture
def fake(tokenizer: PreTrainedTokenizerBase, answer: Any) -> FakeModel:
    return FakeModel(tokenizer, answer)


@pytest.fixture
def start(serve: Any, answer: Any) -> Callable[[str, Play], Any]:
    """Starts a server that answers by `play` at the one path of its kind."""

    def start(kind: str, play: Play) -> Any:
        here = threading.local()
        missing = answer([b'{"detail": "Not Found"}'], status=404)
        server = serve(lambda request: play(request) if here.path == PATHS[kind] else missing)

        class Routed(server.http.RequestHandlerClass):
            def do_POST(self) -> None:
                here.path = self.path
                super().do_POST()

        server.http.RequestHandlerClass = Routed
        return server

    return start


@pytest.fixture
def engine(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ServerEngine]:
    """Engines whose pauses are not made."""

    def engine(kind: str, url: str, **given: Any) -> ServerEngine:
        monkeypatch.setenv("FAKE_KEY", KEY)
        chosen = {"timeout_seconds": 10, "retries": 1, "parallel": 4, "api_key_env": "FAKE_KEY", "push": None, **given}
        made = server_engine(RolloutServer(url=url, model="base", kind=kind, **chosen), tokenizer)
        made.endpoint = replace(made.endpoint, sleep=lambda seconds: None)
        return made

    return engine


def asked(*seeds: int, count: int = 2) -> list[Request]:
    """One request for each seed; the prompt is the seed, too."""
    return [Request(np.array([seed % 200, 5], np.int32), count, seed) for seed in seeds]


def seed_of(request: dict[str, Any]) -> int:
    """Which of the prompts of `asked` this request is for."""
    prompt = request.get("prompt") or request["input_ids"][0]
    return int(prompt[0])


def plain(sample: Sample) -> tuple[list[int], list[float], str, bool]:
    return sample.token_ids.tolist(), sample.logprobs.tolist(), sample.text, sample.finished


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_tokens_that_were_drawn(kind: str, start: Any, engine: Any, fake: FakeModel) -> None:
    server = start(kind, getattr(fake, kind))
    first, second = engine(kind, server.url).sample(asked(1, 2, count=8), WARM)
    for sample in (*first, *second):
        assert sample.token_ids.dtype == np.int32
        assert sample.logprobs.dtype == np.float32
        assert len(sample.logprobs) == len(sample.token_ids) <= 8
        assert sample.finished == (sample.token_ids[-1] == fake.end)
        assert sample.text == fake.text(sample.token_ids)
        assert (sample.logprobs < 0).all()
    assert {sample.finished for sample in (*first, *second)} == {True, False}
    assert len({sample.text for sample in (*first, *second)}) > 8


def test_every_kind_of_server_is_asked_for_the_same_draws(start: Any, engine: Any, fake: FakeModel) -> None:
    urls = {kind: start(kind, getattr(fake, kind)).url for kind in KINDS}
    found = [engine(kind, urls[kind]).sample(asked(1, 2, 3), WARM) for kind in KINDS]
    vllm, sglang, llama_cpp = [[[plain(sample) for sample in one] for one in answers] for answers in found]
    assert vllm == sglang == llama_cpp


@pytest.mark.parametrize("kind", KINDS)
def test_draws_belong_to_the_seeds_and_to_nothing_else(kind: str, start: Any, engine: Any, fake: FakeModel) -> None:
    sampler = engine(kind, start(kind, getattr(fake, kind)).url)
    (alone,) = sampler.sample(asked(7, count=4), WARM)
    _, among, _ = sampler.sample([*asked(3), *asked(7, count=6), *asked(8)], WARM)
    (other,) = sampler.sample(asked(7, count=4), replace(WARM, seed=43))
    assert [plain(sample) for sample in alone] == [plain(sample) for sample in among[:4]]
    assert [plain(sample) for sample in alone] != [plain(sample) for sample in other]


def test_a_server_that_gives_text_alone_is_encoded_and_tells_no_logprobs(
    start: Any, engine: Any, fake: FakeModel
) -> None:
    url = start("openai", fake.openai).url
    (samples,) = engine("openai", url).sample(asked(1, count=8), WARM)
    (drawn,) = engine("vllm", start("vllm", fake.vllm).url).sample(asked(1, count=8), WARM)
    assert [s.token_ids.tolist() for s in samples] == [s.token_ids.tolist() for s in drawn]
    assert [s.finished for s in samples] == [s.finished for s in drawn]
    assert all(np.isnan(sample.logprobs).all() for sample in samples)


def test_a_text_that_spells_a_turn_marker_stays_text(start: Any, engine: Any, fake: FakeModel) -> None:
    said = {"choices": [{"text": "a<|im_end|>b", "finish_reason": "length"}]}
    server = start("openai", lambda request: fake.json(said))
    ((sample,),) = engine("openai", server.url).sample(asked(1, count=1), replace(WARM, max_new_tokens=99))
    assert (sample.text, sample.finished) == ("a<|im_end|>b", False)
    assert fake.end not in sample.token_ids


def test_a_text_ends_with_the_stop_text_that_comes_first(start: Any, engine: Any, fake: FakeModel) -> None:
    server = start("openai", lambda request: fake.json({"choices": [{"text": "one. two!", "finish_reason": "stop"}]}))
    ((sample,),) = engine("openai", server.url).sample(
        asked(1, count=1), replace(WARM, max_new_tokens=99, stop=("!", "."))
    )
    assert (sample.text, sample.finished, len(sample.token_ids)) == ("one.", True, 4)
    assert "stop" not in server.requests[0]


@pytest.mark.parametrize("change", [{"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.1}])
def test_what_a_server_does_not_know_is_refused(change: dict[str, Any], engine: Any) -> None:
    with pytest.raises(RecipeError, match=f"^{next(iter(change))}: a server of kind openai does not know it"):
        engine("openai", "http://127.0.0.1:9/v1").sample(asked(1), replace(WARM, **change))


@pytest.mark.parametrize(
    ("kind", "temperature", "told"), [("vllm", 0.7, False), ("vllm", 1.0, True), ("sglang", 0.7, True)]
)
def test_log_probabilities_of_another_distribution_are_nan(
    kind: str, temperature: float, told: bool, start: Any, engine: Any, fake: FakeModel
) -> None:
    sampler = engine(kind, start(kind, getattr(fake, kind)).url)
    (samples,) = sampler.sample(asked(1), replace(WARM, temperature=temperature))
    assert all(np.isnan(sample.logprobs).all() != told for sample in samples)
    assert all(len(sample.logprobs) == len(sample.token_ids) for sample in samples)


@pytest.mark.parametrize("logprobs", [[-1.0], [-1.0, None], [], None])
def test_log_probabilities_are_told_for_all_tokens_or_for_none(
    logprobs: list[float | None] | None, start: Any, engine: Any, fake: FakeModel
) -> None:
    told = {"token_logprobs": logprobs}
    choice = {"text": "ab", "finish_reason": "length", "token_ids": [70, 71], "logprobs": told}
    server = start("vllm", lambda request: fake.json({"choices": [choice]}))
    ((sample,),) = engine("vllm", server.url).sample(asked(1, count=1), WARM)
    assert sample.token_ids.tolist() == [70, 71]
    assert np.isnan(sample.logprobs).tolist() == [True, True]


@pytest.mark.parametrize(
    ("drawn", "kept", "finished"),
    [("ab$cd$", "ab$", True), ("abcdefghij", "abcdefgh", False), ("abcdefgh$", "abcdefgh", False), ("$", "$", True)],
)
def test_an_answer_ends_where_it_must_although_the_server_went_on(
    drawn: str, kept: str, finished: bool, start: Any, engine: Any, fake: FakeModel
) -> None:
    """A dollar stands for the token that ends a turn; eight tokens are the most."""
    ids = [fake.end if letter == "$" else fake.tokenizer.encode(letter)[0] for letter in drawn]
    logprobs = {"tokens": [], "token_logprobs": [-1.0] * len(ids)}
    choice = {"text": "", "finish_reason": "length", "token_ids": ids, "logprobs": logprobs}
    server = start("vllm", lambda request: fake.json({"choices": [choice]}))
    ((sample,),) = engine("vllm", server.url).sample(asked(1, count=1), WARM)
    assert (sample.token_ids.tolist(), sample.finished) == (ids[: len(kept)], finished)
    assert sample.text == kept.removesuffix("$")
    assert len(sample.logprobs) == len(kept)


def test_requests_are_asked_at_the_same_time(start: Any, engine: Any, fake: FakeModel) -> None:
    """Each of the four waits for the other three: asked one by one, they would never be answered."""
    together = threading.Barrier(4)

    def wait(request: dict[str, Any]) -> Any:
        together.wait(timeout=10)
        return fake.vllm(request)

    answers = engine("vllm", start("vllm", wait).url, parallel=4).sample(asked(1, 2, 3, 4), WARM)
    assert not any(isinstance(one, Failure) for one in answers)


def test_no_requests_and_no_answers_ask_for_nothing(start: Any, engine: Any, fake: FakeModel) -> None:
    server = start("vllm", fake.vllm)
    assert engine("vllm", server.url).sample([], WARM) == []
    assert engine("vllm", server.url).sample(asked(1, count=0), WARM) == [()]
    assert server.requests == []


def spoiled(play: Play, change: Callable[[list[Any]], None]) -> Play:
    """The same answers, with something done to what stands for the answers in them."""

    def spoil(request: dict[str, Any]) -> Any:
        answer = play(request)
        value = json.loads(answer.pieces[0])
        change(value if isinstance(value, list) else value.get("choices", [value]))
        answer.pieces = [json.dumps(value).encode()]
        return answer

    return spoil


FAULTS: dict[str, tuple[dict[str, Any] | Callable[[list[Any]], None], str]] = {
    "500": ({"pieces": [b"out of memory"], "status": 500}, "HTTP 500"),
    "too long a prompt": ({"pieces": [b"maximum context length is 8"], "status": 400}, "HTTP 400"),
    "dies at once": ({"pieces": [b""], "dropped": True}, "no connection"),
    "dies in the middle": ({"pieces": [b'{"choices": [{"text"'], "num_missing": 99}, "no connection"),
    "hangs": ({"pieces": [b"{}"], "pause_seconds": 30}, "timed out"),
    "drips": ({"pieces": [b" "] * 100, "pause_seconds": 0.05}, "timed out"),
    "no JSON": ({"pieces": [b"<html>hello</html>"]}, "wrong JSON"),
    "other JSON": ({"pieces": [b'{"error": null}']}, "wrong answer"),
    "a number": ({"pieces": [b"7"]}, "wrong answer"),
    "fewer answers": (lambda answers: answers.pop(), "wrong answer"),
    "more answers": (lambda answers: answers.append(answers[0]), "wrong answer"),
    "a token that does not exist": (lambda answers: answers[0]["token_ids"].append(999), "wrong answer"),
    "a negative token": (lambda answers: answers[0]["token_ids"].append(-1), "wrong answer"),
    "a huge token": (lambda answers: answers[0]["token_ids"].append(2**70), "wrong answer"),
    "no token": (lambda answers: answers[0]["token_ids"].clear(), "wrong answer"),
    "a number beyond all": (lambda answers: answers[0]["logprobs"].update(token_logprobs=[10**400]), "wrong answer"),
    "a token that is text": (lambda answers: answers[0].update(token_ids=["a"]), "wrong answer"),
    "a probability over 1": (lambda answers: answers[0]["logprobs"].update(token_logprobs=[0.5]), "wrong answer"),
    "broken off": (lambda answers: answers[0].update(finish_reason="abort"), "wrong answer"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_request_that_the_server_fails_at_fails_alone(
    name: str, start: Any, engine: Any, fake: FakeModel, answer: Any
) -> None:
    fault, reason = FAULTS[name]
    bad = (lambda request: answer(**fault)) if isinstance(fault, dict) else spoiled(fake.vllm, fault)
    server = start("vllm", lambda request: bad(request) if seed_of(request) == 2 else fake.vllm(request))
    first, second, third = engine("vllm", server.url, timeout_seconds=0.5).sample(asked(1, 2, 3), WARM)
    assert isinstance(second, Failure)
    assert second.reason == reason
    (expected,) = engine("vllm", server.url).sample(asked(3), WARM)
    assert not isinstance(first, Failure)
    assert [plain(sample) for sample in third] == [plain(sample) for sample in expected]


@pytest.mark.parametrize("name", [name for name in FAULTS if name != "too long a prompt"])
def test_a_fault_that_passes_is_mended_by_asking_again(
    name: str, start: Any, engine: Any, fake: FakeModel, answer: Any
) -> None:
    fault, _ = FAULTS[name]
    bad = (lambda request: answer(**fault)) if isinstance(fault, dict) else spoiled(fake.vllm, fault)
    plays: Iterator[Play] = iter([bad, fake.vllm])
    server = start("vllm", lambda request: next(plays)(request))
    (samples,) = engine("vllm", server.url, timeout_seconds=0.5).sample(asked(1), WARM)
    assert not isinstance(samples, Failure)
    assert server.requests[0] == server.requests[1]


@pytest.mark.parametrize("kind", ["sglang", "llama_cpp"])
def test_one_bad_answer_of_a_request_fails_the_request(kind: str, start: Any, engine: Any, fake: FakeModel) -> None:
    """SGLang aborts one of two; llama.cpp, asked for one answer at a time, has lost the prompt of the second."""
    spoil = {
        "sglang": lambda answers: answers[1]["meta_info"]["finish_reason"].update(type="abort"),
        "llama_cpp": lambda answers: answers[0].update(truncated=answers[0]["content"] == lost),
    }
    (good,) = engine(kind, start(kind, getattr(fake, kind)).url).sample(asked(1), WARM)
    lost = good[1].text
    (bad,) = engine(kind, start(kind, spoiled(getattr(fake, kind), spoil[kind])).url).sample(asked(1), WARM)
    assert bad == Failure("wrong answer", "an answer was broken off by the server")


def test_a_server_that_dies_for_good_is_given_up(start: Any, engine: Any, fake: FakeModel, answer: Any) -> None:
    """It answers five requests; then only as many are tried as may fail in a row, and those that are under way."""
    turns, lock = iter(range(10_000)), threading.Lock()

    def die(request: dict[str, Any]) -> Any:
        with lock:
            alive = next(turns) < 5
        return fake.vllm(request) if alive else answer([b""], dropped=True)

    server = start("vllm", die)
    answers = engine("vllm", server.url, parallel=2).sample(asked(*range(100)), WARM)
    reasons = [one.reason for one in answers if isinstance(one, Failure)]
    assert (len(answers), len(reasons)) == (100, 95)
    assert set(reasons) == {"no connection", "not asked"}
    assert len(server.requests) <= 5 + 2 * (16 + 2)


def test_prompts_that_a_server_refuses_do_not_stop_the_rest(
    start: Any, engine: Any, fake: FakeModel, answer: Any
) -> None:
    refuse = answer([b"too long"], status=400)
    server = start("vllm", lambda request: refuse if seed_of(request) < 40 else fake.vllm(request))
    answers = engine("vllm", server.url).sample(asked(*range(50)), WARM)
    assert [isinstance(one, Failure) for one in answers] == [True] * 40 + [False] * 10


@pytest.mark.parametrize("kind", [*KINDS, "openai"])
@pytest.mark.parametrize("status", [200, 400, 401, 500])
@pytest.mark.parametrize("twice", [False, True])
def test_no_key_is_shown_whatever_the_server_does_with_it(
    kind: str, status: int, twice: bool, start: Any, engine: Any, answer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The server says it back, as some do in their error messages, or as a name that stands twice in JSON."""
    caplog.set_level(logging.DEBUG)
    said = (
        f'{{"{KEY}": 1, "{KEY}": 2}}'
        if twice
        else json.dumps({KEY: KEY, "choices": KEY, "meta_info": {"finish_reason": KEY}, "stop_type": KEY})
    )
    server = start(kind, lambda request: answer([said.encode()], status=status))
    sampler = engine(kind, server.url)
    (failure,) = sampler.sample(asked(1), WARM)
    assert isinstance(failure, Failure)
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in f"{failure!r} {sampler!r} {caplog.text}"
