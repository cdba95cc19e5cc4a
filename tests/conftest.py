"""What holds for all tests, the tiny chat models that whole runs are tried with, and a server that judges."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import luthier
from luthier.training.callbacks import Callback, Metrics

_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# A busy machine takes longer than the 200 ms that hypothesis allows an example; that is no fault of the code.
hypothesis.settings.register_profile("luthier", deadline=None, max_examples=50)  # so the suite ends in ten minutes
hypothesis.settings.load_profile("luthier")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Test processes run side by side, one a core, and tiny tensors take ten times as long on contended threads."""
    torch.set_num_threads(1)


class _StopAt:
    """Interrupts a run once a step is computed and not yet saved."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_start(self, step: int, num_steps: int) -> None: ...

    def on_metrics(self, metrics: Metrics) -> None:
        if metrics["step"] == self.step:
            raise KeyboardInterrupt

    def on_end(self) -> None: ...


@pytest.fixture(scope="session")
def stop_at() -> Callable[[int | None], Callback]:
    """A callback that interrupts a run once a step, counted from 1, is computed and not yet saved; None for no step."""
    return _StopAt


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a two-layer model from a configuration and a seed, with a byte tokenizer and a ChatML template."""
    return _saved(tmp_path_factory.mktemp("models") / "tiny", hidden_size=32, intermediate_size=64)


@pytest.fixture(scope="session")
def wide_chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with layers that have room for the usual ranks of adapters."""
    return _saved(tmp_path_factory.mktemp("models") / "wide", hidden_size=128, intermediate_size=192)


@pytest.fixture(scope="session")
def speaker(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, taught to say something short and to stop."""
    folder = tmp_path_factory.mktemp("speaker")
    rows = [{"question": f"What is {i}?", "answer": "ab" * (i % 3 + 1)} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = luthier.load(str(chat_model))
    given = {"adapter": None, "learning_rate": 1e-2, "epochs": 20, "batch_size": 8, "save_every": None}
    luthier.sft(model, data=folder / "rows.jsonl", output=folder / "run", **given)
    return Path(luthier.save(model, folder / "model"))


def _saved(folder: Path, **sizes: int) -> Path:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    end = "<|im_end|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token=end, chat_template=_CHATML)
    torch.manual_seed(0)
    shape = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(LlamaConfig(**shape, **sizes, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass
class Answer:
    """What the server does with one request. pieces: the body, with a pause of so many seconds after each.

    num_missing: bytes that are announced and never sent. dropped: the connection is closed without a word.
    """

    pieces: list[bytes]
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    pause_seconds: float = 0.0
    num_missing: int = 0
    dropped: bool = False


Play = Callable[[dict[str, Any]], Answer | str]


class Server:
    """Answers by `play`, which gets the request's JSON; text is what the judge says. Keeps what it was asked."""

    def __init__(self, play: Play) -> None:
        self.play, self.requests, self.headers = play, [], []
        self.over, self.lock = threading.Event(), threading.Lock()
        handler = type("Handler", (_Handler,), {"owner": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.over.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


class _Handler(BaseHTTPRequestHandler):
    owner: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.owner.lock:
            self.owner.requests.append(request)
            self.owner.headers.append(dict(self.headers))
        answer = self.owner.play(request)
        if isinstance(answer, str):
            body = {"choices": [{"message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}]}
            answer = Answer([json.dumps(body).encode()])
        self.close_connection = True
        if not answer.dropped:
            self.send(answer)

    def send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(sum(map(len, answer.pieces)) + answer.num_missing))
        self.end_headers()
        for piece in answer.pieces:
            if self.owner.over.wait(answer.pause_seconds):
                return
            try:
                self.wfile.write(piece)
            except OSError:  # who asked has gone
                return

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""


@pytest.fixture
def serve() -> Iterator[Callable[[Play], Server]]:
    """Starts servers, and stops them after the test."""
    servers: list[Server] = []

    def start(play: Play) -> Server:
        servers.append(Server(play))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def answer() -> type[Answer]:
    """What a server can do with a request, besides saying a text."""
    return Answer
