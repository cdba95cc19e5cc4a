"""What recipes say of things outside: a function in a file, and a model behind an OpenAI-compatible server.

A secret never stands in a recipe, which is copied into every run's folder: only the name of the environment variable
that holds it.
"""

import re
from typing import Annotated

from annotated_types import Ge, Gt
from pydantic import AfterValidator

from luthier.recipe.settings import Count, Settings, Word

__all__ = ["Address", "FunctionPlace", "KeyVariable", "Seconds", "Server"]

Seconds = Annotated[float, Gt(0)]


def _function(place: str) -> str:
    if re.fullmatch(r".*\.py:[A-Za-z_]\w*", place):
        return place
    raise ValueError(f'expected a function in a file, such as "judge.py:prefer", got "{place}"')


FunctionPlace = Annotated[Word, AfterValidator(_function)]
"""`file.py:function`."""


def _address(url: str) -> str:
    """Refused without showing it where it may hold a secret."""
    if set("@?#") & set(url):
        raise ValueError("expected an address without @, ? and #; a key belongs in an environment variable")
    if re.fullmatch(r"https?://[^/\s]+(/\S*)?", url):
        return url.rstrip("/")
    raise ValueError(f'expected an address such as "http://localhost:8000/v1", got "{url}"')


def _variable(name: str) -> str:
    """Capitals alone, so that most keys pasted by mistake are refused; and what was pasted is not shown."""
    if re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        return name
    raise ValueError("expected the name of an environment variable in capitals, such as OPENAI_API_KEY, never a key")


Address = Annotated[Word, AfterValidator(_address)]
"""Where a server is, without a / at the end and without a key."""

KeyVariable = Annotated[Word, AfterValidator(_variable)]
"""The name of an environment variable that holds a key."""


class Server(Settings):
    """A model behind an OpenAI-compatible server."""

    url: Address
    """The server's address up to /v1; /chat/completions is added."""

    model: Word
    """The model's name there."""

    api_key_env: KeyVariable | None = None
    """The environment variable that holds the key; none for a server without keys."""

    max_new_tokens: Count = 512
    """The longest reply, in tokens; a judge that thinks before it speaks needs more."""

    timeout_seconds: Seconds = 30.0
    """How long one reply may take."""

    retries: Annotated[int, Ge(0)] = 3
    """How often a question is asked again after a timeout, a lost connection, or the statuses 408, 429 and 5xx."""

    parallel: Count = 4
    """Questions that are asked at the same time."""
