"""An OpenAI-compatible server in a thread, which says whatever a test wants."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


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
