"""The process in which an answer's program runs: confined, without the tests, asked one call at a time.

It can return what it likes, but it knows neither what is expected nor where the verdict goes. `examiner.py` asks.
"""

import json
import operator
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from luthier.rollout.confinement import confine
from luthier.rollout.values import pack, unpack

__all__ = ["main"]

_OPERATIONS: dict[str, Callable[..., object]] = {
    "get": getattr,
    "item": operator.getitem,
    "iterate": iter,
    "length": len,
    "next": next,
}


class _Objects:
    """Objects that were given out, by number."""

    def __init__(self) -> None:
        self.kept: list[object] = []

    def keep(self, value: object) -> int:
        self.kept.append(value)
        return len(self.kept) - 1

    def find(self, number: int) -> object:
        return self.kept[number]


def main() -> None:
    """Arguments: a folder to write to, and limits. The first line on standard input is the program."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    sys.set_int_max_str_digits(0)
    closed = confine(Path(sys.argv[1]), memory_bytes=int(sys.argv[2]), cpu_seconds=int(sys.argv[3]))
    _say(replies, {"closed": closed})
    namespace: dict[str, Any] = {"__name__": "answer"}
    objects = _Objects()
    for line in requests:
        _say(replies, _reply(json.loads(line), namespace, objects))


def _reply(asked: dict[str, Any], namespace: dict[str, Any], objects: _Objects) -> dict[str, Any]:
    try:
        if "program" in asked:
            exec(compile(asked["program"], "answer", "exec", dont_inherit=True), namespace)
            return {"names": _names(namespace, objects)}
        return _result(asked, objects)
    except BaseException as error:  # whatever it is, the tests shall see it
        return {"raised": type(error).__name__, "text": str(error)}


def _names(namespace: dict[str, Any], objects: _Objects) -> dict[str, Any]:
    """What the program defines, but for modules."""
    defined = {name: value for name, value in namespace.items() if not name.startswith("__")}
    return {name: pack(value, objects.keep) for name, value in defined.items() if not isinstance(value, ModuleType)}


def _result(asked: dict[str, Any], objects: _Objects) -> dict[str, Any]:
    """What an operation on an object gives, and what became of the values that it was given."""
    target = objects.find(asked["object"])
    given = [unpack(value, objects.find) for value in asked["given"]]
    if asked["operation"] == "call":
        named = {name: unpack(value, objects.find) for name, value in asked["named"].items()}
        assert callable(target)
        value = target(*given, **named)
    else:
        value = _OPERATIONS[asked["operation"]](target, *given)
    return {"value": pack(value, objects.keep), "given": [pack(one, objects.keep) for one in given]}


def _say(replies: IO[bytes], what: dict[str, Any]) -> None:
    try:
        line = json.dumps(what).encode()
    except (TypeError, ValueError, RecursionError) as error:
        line = json.dumps({"raised": type(error).__name__, "text": str(error)}).encode()
    replies.write(line + b"\n")
    replies.flush()
