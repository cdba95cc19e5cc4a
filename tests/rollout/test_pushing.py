"""Updates reach the servers that can take them, and training on one that cannot is refused."""

import json
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from luthier.errors import LuthierError, ModelError, RecipeError, TrainingError
from luthier.recipe.rollout_servers import RolloutServer
from luthier.rollout.pushing import check_updates
from luthier.rollout.requests import Request, Sampling
from luthier.rollout.scoring import Failure
from luthier.rollout.server_engine import ServerEngine, server_engine

KEY = "sk-very-secret-0123456789"
ANSWER = {"index": 0, "text": "a", "finish_reason": "length", "token_ids": [70], "logprobs": None}


class FakeServer:
    """Keeps adapters as vLLM does, below /v1, or as SGLang does, beside it; answers where it knows the model.

    faults: by path, what is answered there in place of what should be.
    """

    def __init__(self, kind: str, answer: Any) -> None:
        self.kind, self.answer, self.faults, self.here = kind, answer, {}, threading.local()
        self.adapters: dict[str, Path] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []
        prefix = "/v1" if kind == "vllm" else ""
        self.routes: dict[str, Callable[[dict[str, Any]], Any]] = {
            f"{prefix}/load_lora_adapter": self.load,
            f"{prefix}/unload_lora_adapter": self.unload,
        }
        own = {"/v1/completions": self.complete} if kind == "vllm" else {"/generate": self.generate}
        self.routes |= own if kind == "vllm" else {**own, "/update_weights_from_disk": self.update}

    def play(self, request: dict[str, Any]) -> Any:
        path = self.here.path
        self.calls.append((path, request))
        fault = self.faults.get(path)
        return fault or self.routes.get(path, lambda _: self.say({"detail": "Not Found"}, 404))(request)

    def load(self, request: dict[str, Any]) -> Any:
        name, folder = request["lora_name"], Path(request["lora_path"])
        if name in self.adapters or not (folder / "adapter_config.json").is_file():
            return self.say({"success": False, "error_message": f"{name} is loaded already, or is not there"}, 400)
        self.adapters[name] = folder
        if self.kind == "vllm":
            return self.answer([f"Success: LoRA adapter '{name}' added successfully.".encode()])
        return self.say({"success": True, "error_message": None, "loaded_adapters": {}})

    def unload(self, request: dict[str, Any]) -> Any:
        if self.adapters.pop(request["lora_name"], None) is None:
            return self.say({"error": {"message": "cannot be found"}}, 404)
        return self.say({"success": True})

    def update(self, request: dict[str, Any]) -> Any:
        found = (Path(request["model_path"]) / "config.json").is_file()
        return self.say({"success": found, "message": "Succeeded" if found else "no such file"}, 200 if found else 400)

    def complete(self, request: dict[str, Any]) -> Any:
        known = request["model"] in (*self.adapters, "base")
        return self.say({"choices": [ANSWER]}) if known else self.say({"error": {"message": "no such model"}}, 404)

    def generate(self, request: dict[str, Any]) -> Any:
        if request.get("lora_path") not in (*self.adapters, None):
            return self.say({"error": {"message": "no such adapter"}}, 400)
        meta = {"finish_reason": {"type": "length"}, "output_token_logprobs": [[-1.0, 70, None]]}
        return self.say([{"text": "a", "meta_info": meta}])

    def say(self, value: Any, status: int = 200) -> Any:
        return self.answer([json.dumps(value).encode()], status=status)


@pytest.fixture
def start(serve: Any, answer: Any) -> Callable[[str], tuple[FakeServer, str]]:
    """Starts a server of a kind; gives it, and its address."""

    def start(kind: str) -> tuple[FakeServer, str]:
        fake = FakeServer(kind, answer)
        server = serve(fake.play)

        class Routed(server.http.RequestHandlerClass):
            def do_POST(self) -> None:
                fake.here.path = self.path
                super().do_POST()

        server.http.RequestHandlerClass = Routed
        return fake, server.url

    return start


@pytest.fixture
def engine(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ServerEngine]:
    """Engines whose pauses are not made."""

    def engine(kind: str, url: str, **given: Any) -> ServerEngine:
        monkeypatch.setenv("FAKE_KEY", KEY)
        chosen = {"timeout_seconds": 10, "retries": 1, "api_key_env": "FAKE_KEY", **given}
        settings = RolloutServer(url=url, model="base", kind=kind, **chosen)
        made = server_engine(settings, AutoTokenizer.from_pretrained(chat_model))
        assert made.pusher is not None
        made.pusher.endpoint = replace(made.pusher.endpoint, sleep=lambda seconds: None)
        return made

    return engine


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """The folder of a saved adapter, as far as a server looks at it here."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    return tmp_path / "adapter"


def asks(sampler: ServerEngine) -> bool:
    """Whether one prompt is answered."""
    (found,) = sampler.sample([Request(np.array([1], np.int32))], Sampling(max_new_tokens=1))
    return not isinstance(found, Failure)


@pytest.mark.parametrize(("kind", "field"), [("vllm", "model"), ("sglang", "lora_path")])
def test_after_a_push_the_new_adapter_answers(kind: str, field: str, start: Any, engine: Any, adapter: Path) -> None:
    fake, url = start(kind)
    sampler = engine(kind, url)
    assert asks(sampler)
    for version in (1, 2):
        sampler.push(adapter, version)
        assert asks(sampler)
        assert fake.adapters == {f"luthier-{version}": adapter}
    named = [request.get(field) for path, request in fake.calls if path in ("/v1/completions", "/generate")]
    assert named == ["base" if kind == "vllm" else None, "luthier-1", "luthier-2"]


def test_the_old_adapter_stays_until_the_new_one_is_there(start: Any, engine: Any, adapter: Path) -> None:
    fake, url = start("vllm")
    sampler = engine("vllm", url, adapter_name="mine")
    sampler.push(adapter, 1)
    sampler.push(adapter, 2)
    assert [(path.removeprefix("/v1/"), request["lora_name"]) for path, request in fake.calls] == [
        ("load_lora_adapter", "mine-1"),
        ("load_lora_adapter", "mine-2"),
        ("unload_lora_adapter", "mine-1"),
    ]


def test_the_whole_model_is_read_anew_under_its_own_name(start: Any, engine: Any, tmp_path: Path) -> None:
    fake, url = start("sglang")
    (tmp_path / "config.json").write_text("{}")
    sampler = engine("sglang", url, push="weights")
    sampler.push(tmp_path, 1)
    sampler.push(tmp_path, 2)
    assert asks(sampler)
    assert fake.calls[:2] == [("/update_weights_from_disk", {"model_path": str(tmp_path)})] * 2
    assert "lora_path" not in fake.calls[2][1]


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_an_adapter_left_by_a_run_that_was_stopped_is_replaced(
    kind: str, start: Any, engine: Any, adapter: Path
) -> None:
    fake, url = start(kind)
    fake.adapters["luthier-7"] = Path("elsewhere")
    engine(kind, url).push(adapter, 7)
    assert fake.adapters == {"luthier-7": adapter}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"pieces": [b'{"detail": "Not Found"}'], "status": 404}, r'\(HTTP 404: {"detail": "Not Found"}\)'),
        (
            {"pieces": [f"rank 64 is too high {KEY}".encode()], "status": 400},
            r"\(HTTP 400: rank 64 is too high \[key\]\)",
        ),
        ({"pieces": [b"out of memory"], "status": 500}, r"\(HTTP 500: out of memory\)"),
        ({"pieces": [b'{"success": false}']}, r"\(refused: the server says that it has failed\)"),
        ({"pieces": [b""], "dropped": True}, r"\(no connection: .*\)"),
    ],
)
def test_a_push_that_fails_says_what_is_needed_and_changes_nothing(
    fault: dict[str, Any], said: str, start: Any, engine: Any, adapter: Path, answer: Any
) -> None:
    fake, url = start("vllm")
    sampler = engine("vllm", url)
    sampler.push(adapter, 1)
    fake.faults["/v1/load_lora_adapter"] = answer(**fault)
    with pytest.raises(
        TrainingError, match=rf"^{url}: does not take version 2 from .* {said}; vLLM needs --enable-lora"
    ):
        sampler.push(adapter, 2)
    assert asks(sampler)
    assert fake.calls[-1][1]["model"] == "luthier-1"


def test_a_server_that_is_down_is_one_sentence_without_the_key(engine: Any, adapter: Path, serve: Any) -> None:
    server = serve(lambda request: "")
    server.stop()
    with pytest.raises(LuthierError) as caught:
        engine("sglang", server.url).push(adapter, 1)
    assert "no connection" in str(caught.value)
    assert KEY not in f"{caught.value}"
    assert "\n" not in str(caught.value)


def test_an_adapter_that_cannot_be_unloaded_is_reported_and_no_more(
    start: Any, engine: Any, adapter: Path, answer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fake, url = start("vllm")
    fake.faults["/v1/unload_lora_adapter"] = answer([b"was not there"], status=500)
    sampler = engine("vllm", url)
    sampler.push(adapter, 1)
    with caplog.at_level(logging.WARNING):
        sampler.push(adapter, 2)
    assert f"{url}: keeps the adapter luthier-1: HTTP 500 was not there" in caplog.text
    assert asks(sampler)


def test_another_machine_is_given_a_copy_by_its_own_path(
    start: Any, engine: Any, adapter: Path, tmp_path: Path
) -> None:
    """The server's path to the shared folder is a link here."""
    fake, url = start("vllm")
    (tmp_path / "there").symlink_to(tmp_path / "shared")
    shared = {"shared_folder": str(tmp_path / "shared"), "server_folder": str(tmp_path / "there")}
    sampler = engine("vllm", url, **shared)
    for version in (1, 2):
        sampler.push(adapter, version)
    assert fake.adapters == {"luthier-2": tmp_path / "there" / "luthier-2"}
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["luthier-2"]


@pytest.mark.parametrize(("push", "missing"), [("adapter", "adapter_config.json"), ("weights", "config.json")])
def test_a_folder_without_what_is_pushed_is_not_sent(
    push: str, missing: str, start: Any, engine: Any, tmp_path: Path
) -> None:
    fake, url = start("sglang")
    with pytest.raises(ModelError, match=f"holds no {missing}, so it cannot be pushed"):
        engine("sglang", url, push=push).push(tmp_path, 1)
    assert fake.calls == []


@pytest.mark.parametrize("kind", ["llama_cpp", "openai", "vllm"])
def test_training_on_a_server_that_is_never_updated_is_refused(kind: str) -> None:
    settings = RolloutServer(url="http://localhost:8000/v1", model="m", kind=kind, push=None)
    with pytest.raises(RecipeError, match=r"^push: http://localhost:8000/v1 is never updated, .* allow_stale: true$"):
        check_updates(settings)
    check_updates(settings.model_copy(update={"allow_stale": True}))


def test_training_on_a_server_that_is_updated_is_not_refused() -> None:
    check_updates(RolloutServer(url="http://localhost:8000/v1", model="m", kind="sglang"))


def test_nothing_can_be_pushed_to_a_server_that_takes_nothing(chat_model: Path, adapter: Path) -> None:
    settings = RolloutServer(url="http://localhost:8000/v1", model="m", kind="llama_cpp", push=None)
    with pytest.raises(RecipeError, match=r"^push: none leaves"):
        server_engine(settings, AutoTokenizer.from_pretrained(chat_model)).push(adapter, 1)
