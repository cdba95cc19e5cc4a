"""A model behind a server, asked over HTTP by the standard library: for JSON, or for a turn of a conversation.

A request is repeated after a timeout, a lost connection, or a status that says "later", with exponentially growing,
jittered pauses, or the pause that the server asks for. What cannot be had comes back as a Failure, never as an
exception. Redirects are not followed, since they would carry the key to another host, and the key stands in no text
that leaves this file.
"""

import json
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from http.client import HTTPException, HTTPResponse, IncompleteRead
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)

from luthier import __version__
from luthier.data.examples import Message
from luthier.data.strict_json import parse_json
from luthier.errors import DataError, RecipeError
from luthier.rollout.scoring import Failure

__all__ = ["WRONG_JSON", "Endpoint", "Reply", "is_silence", "key_from"]

WRONG_JSON = "wrong JSON"  # the reason of a Failure that no repetition here can mend

_TIMED_OUT, _NO_CONNECTION = "timed out", "no connection"

_LATER = (408, 425, 429)  # statuses, besides 5xx, that a repetition may mend
_LONGEST_PAUSE_SECONDS = 120.0
_PIECE_BYTES = 2**16
_SHOWN_CHARACTERS = 200

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said, and why it stopped, in the server's word: stop, length."""

    text: str
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class _Trouble:
    """One request without a reply. later: asking again may help; pause_seconds: what the server asks for."""

    failure: Failure
    later: bool = True
    pause_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A model of a server. url: up to /v1. timeout_seconds: of one reply. retries: of one question.

    most_bytes: of a reply. sleep, jitter: how pauses are made, for tests. Raises RecipeError for a key that no header
    can hold.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout_seconds: float = 30.0
    retries: int = 3
    most_bytes: int = 16 * 2**20
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)
    jitter: random.Random = field(default_factory=random.Random, repr=False)

    def __post_init__(self) -> None:
        if self.key is not None and not (self.key.isascii() and self.key.isprintable()):
            raise RecipeError(f"{self.url}: its key holds characters that no key has; set it anew")  # never shown

    def reply(self, messages: Sequence[Message], *, max_new_tokens: int, temperature: float = 0.0) -> Reply | Failure:
        """The model's next turn, or why there is none after all repetitions. Safe to call from several threads."""
        asked = {
            "model": self.model,
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "max_tokens": max_new_tokens,
            "temperature": temperature,
        }
        return _reply_in(self.ask("/chat/completions", asked))

    def ask(self, path: str, asked: Mapping[str, Any]) -> Any | Failure:
        """What the JSON says that is answered at this path below the url, or why there is none. Safe in threads."""
        found = self.post(path, asked)
        if isinstance(found, Failure):
            return found
        try:
            return parse_json(found.decode())
        except (UnicodeDecodeError, DataError) as error:
            return Failure(WRONG_JSON, self._safe(str(error)))

    def post(self, path: str, asked: Mapping[str, Any]) -> bytes | Failure:
        """The body of the answer at this path below the url, or why there is none after all repetitions."""
        body = json.dumps(asked).encode()
        found = self._ask(path, body)
        for attempt in range(self.retries):
            if isinstance(found, bytes) or not found.later:
                break
            pause = self._pause(attempt) if found.pause_seconds is None else found.pause_seconds
            _log.info("%s: %s; asking again in %.1f s", self.url, found.failure.reason, pause)
            self.sleep(pause)
            found = self._ask(path, body)
        return found if isinstance(found, bytes) else found.failure

    def beside_v1(self) -> "Endpoint":
        """The same server, for what lies beside /v1 and not below it."""
        return replace(self, url=self.url.removesuffix("/v1"))

    def _pause(self, attempt: int) -> float:
        """Seconds: 1, 2, 4... times a half to three halves, so that parallel questions do not come back together."""
        return float(min(2.0**attempt * self.jitter.uniform(0.5, 1.5), _LONGEST_PAUSE_SECONDS))

    def _ask(self, path: str, body: bytes) -> bytes | _Trouble:
        headers = {"Content-Type": "application/json", "User-Agent": f"luthier/{__version__}"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        request = Request(f"{self.url}{path}", data=body, headers=headers, method="POST")
        deadline = time.monotonic() + self.timeout_seconds
        try:
            with _opener().open(request, timeout=self.timeout_seconds) as response:
                return _read(response, deadline, self.most_bytes)
        except HTTPError as error:
            with error:
                return self._refused(error)
        except (OSError, HTTPException, UnicodeError) as error:  # a host's name may be none
            cause = error.reason if isinstance(error, URLError) else error
            if isinstance(cause, TimeoutError):
                return _Trouble(Failure(_TIMED_OUT, f"no reply within {self.timeout_seconds:g} seconds"))
            return _Trouble(Failure(_NO_CONNECTION, self._safe(str(cause) or type(cause).__name__)))

    def _refused(self, error: HTTPError) -> _Trouble:
        failure = Failure(f"HTTP {error.code}", self._detail(error))
        if error.code not in _LATER and error.code < 500:
            return _Trouble(failure, later=False)
        pause = _asked_pause(error.headers.get("Retry-After", ""))
        if pause is not None and pause > _LONGEST_PAUSE_SECONDS:
            failure = Failure(failure.reason, f"the server asks to wait for {pause:.0f} seconds")
            return _Trouble(failure, later=False)
        return _Trouble(failure, pause_seconds=pause)

    def _detail(self, error: HTTPError) -> str:
        if error.code in (401, 403):
            return "the server does not take this key"  # its own words may quote the key
        try:
            return self._safe(error.read(_PIECE_BYTES).decode(errors="replace"))
        except (OSError, HTTPException):
            return ""

    def _safe(self, text: str) -> str:
        """Foreign words on one line, short, and without the key."""
        shown = text if self.key is None else text.replace(self.key, "[key]")
        return " ".join(shown.split())[:_SHOWN_CHARACTERS]


def is_silence(failure: Failure) -> bool:
    """Whether a server gave no answer at all, as one that is down does, rather than refused what it was asked."""
    return failure.reason in (_TIMED_OUT, _NO_CONNECTION) or failure.reason.startswith("HTTP 5")


def key_from(environment: Mapping[str, str], name: str) -> str:
    """The key in an environment variable. Raises RecipeError, without the key."""
    key = environment.get(name, "").strip()
    if not key:
        raise RecipeError(f"api_key_env: the environment variable {name} is not set; set it, or leave api_key_env out")
    return key


@cache
def _opener() -> OpenerDirector:
    """HTTP and HTTPS, by the proxies of the environment, and nothing else: no redirects, no files."""
    opener = OpenerDirector()
    for handler in (ProxyHandler, HTTPHandler, HTTPSHandler, HTTPDefaultErrorHandler, HTTPErrorProcessor):
        opener.add_handler(handler())
    opener.add_handler(UnknownHandler())
    return opener


def _read(response: HTTPResponse, deadline: float, most_bytes: int) -> bytes:
    """The whole body; the socket's own timeout would allow each byte so long. Raises OSError or HTTPException."""
    pieces, size = [], 0
    while piece := response.read1(_PIECE_BYTES):
        pieces.append(piece)
        size += len(piece)
        if size > most_bytes:
            raise HTTPException(f"a reply of more than {most_bytes} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    if response.length:
        raise IncompleteRead(b"".join(pieces), response.length)
    return b"".join(pieces)


def _reply_in(value: Any | Failure) -> Reply | Failure:
    match value:
        case Failure():
            return value
        case {"choices": [{"message": {"content": str(text)}} as choice, *_]}:
            finish = choice.get("finish_reason")
            return Reply(text, finish if isinstance(finish, str) else None)
    return Failure(WRONG_JSON, "the reply has no choices[0].message.content")


def _asked_pause(header: str) -> float | None:
    """Seconds that Retry-After asks for, as a number or a date (RFC 9110, section 10.2.3)."""
    if header.strip().isdecimal():
        return float(header)
    try:
        moment = parsedate_to_datetime(header)
    except ValueError:
        return None
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (aware - datetime.now(UTC)).total_seconds())
