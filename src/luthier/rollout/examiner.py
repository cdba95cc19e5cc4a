"""The process in which the tests of an answer run: confined too, it asks the candidate's process and writes verdicts.

The tests see the program's functions and classes as stand-ins: a call goes to the other process, and only plain values
come back, so no trick with equality, with `assert` or with exiting early reaches this side. What stand-ins cannot do is
take a test's own function as an argument, or compare objects of the program's own classes.
"""

import builtins
import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import CodeType
from typing import IO, Any

from luthier.rollout.confinement import confine
from luthier.rollout.values import pack, unpack

__all__ = ["main"]


class _Lost(Exception):
    """The candidate's process is no more, or answers nonsense."""


class _Candidate:
    """The other process. lost: nothing can be asked any more, whatever the tests make of it."""

    def __init__(self, requests: IO[bytes], replies: IO[bytes]) -> None:
        self.requests, self.replies, self.lost = requests, replies, False

    def ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        try:
            self.requests.write(json.dumps(asked).encode() + b"\n")
            self.requests.flush()
            said = self.heard()
        except (OSError, ValueError) as error:
            self.lost = True
            raise _Lost(str(error)) from None
        if "raised" in said:
            raise _raised(str(said["raised"]), str(said.get("text")))
        return said

    def heard(self) -> dict[str, Any]:
        said = json.loads(self.replies.readline())
        if not isinstance(said, dict):
            raise ValueError("no reply")
        return said

    def stand_in(self, number: int) -> "_StandIn":
        return _StandIn(self, number)


class _StandIn:
    """An object of the other process; equal to itself alone."""

    __contains__ = None  # or else a sequence without end would contain whatever is looked for

    def __init__(self, candidate: _Candidate, number: int) -> None:
        self._candidate, self._number = candidate, number

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self._ask("call", given, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("get", (name,))

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", (key,))

    def __iter__(self) -> Any:
        return self._ask("iterate")

    def __next__(self) -> Any:
        return self._ask("next")

    def __len__(self) -> int:
        length: int = self._ask("length")
        return length

    def __bool__(self) -> bool:
        return True

    def _ask(self, operation: str, given: tuple[Any, ...] = (), named: dict[str, Any] | None = None) -> Any:
        asked = {"object": self._number, "operation": operation, "given": [pack(one, _number) for one in given]}
        asked["named"] = {name: pack(one, _number) for name, one in (named or {}).items()}
        said = self._candidate.ask(asked)
        for one, changed in zip(given, said["given"], strict=True):
            _become(one, unpack(changed, self._candidate.stand_in))
        return unpack(said["value"], self._candidate.stand_in)


def main() -> None:
    """Arguments: pipes to and from the candidate, a folder to write to, limits. Standard input: program and tests."""
    verdicts = os.fdopen(os.dup(1), "w", encoding="utf-8")
    task = json.load(sys.stdin)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    sys.set_int_max_str_digits(0)
    candidate = _Candidate(os.fdopen(int(sys.argv[1]), "wb"), os.fdopen(int(sys.argv[2]), "rb"))
    closed = confine(Path(sys.argv[3]), memory_bytes=int(sys.argv[4]), cpu_seconds=int(sys.argv[5]))
    for verdict in _verdicts(task, candidate, closed):
        print(json.dumps(verdict), file=verdicts, flush=True)
    os._exit(0)  # whatever the tests may have left running


def _verdicts(task: dict[str, Any], candidate: _Candidate, closed: list[str]) -> Iterator[dict[str, Any]]:
    """What is closed in both processes, then whether each test has passed; or why the tests cannot be run."""
    try:
        tests = [compile(text, "tests", "exec", dont_inherit=True) for text in task["tests"]]
    except (SyntaxError, ValueError) as error:
        yield {"broken": f"{type(error).__name__}: {error}"}
        return
    yield {"closed": sorted({*closed} & {*candidate.heard()["closed"]})}
    try:
        found = candidate.ask({"program": task["program"]})["names"]
        names = {name: unpack(value, candidate.stand_in) for name, value in found.items()}
    except Exception:
        return  # the program itself fails, so all tests do
    entry_point = task["entry_point"]
    hidden = {name for name in names if name in vars(builtins) or name.startswith("__")}
    namespace = {"__name__": "tests", **{name: value for name, value in names.items() if name not in hidden}}
    for test in tests:
        passed = _passes(test, namespace) and (entry_point is None or _checks(namespace, names.get(entry_point)))
        yield {"passed": passed and not candidate.lost}


def _passes(test: CodeType, namespace: dict[str, Any]) -> bool:
    try:
        exec(test, namespace)
    except BaseException:  # a test may even exit
        return False
    return True


def _checks(namespace: dict[str, Any], function: object) -> bool:
    try:
        namespace["check"](function)
    except BaseException:
        return False
    return True


def _raised(kind: str, text: str) -> Exception:
    """An exception of Python's own of this name, or one that says it."""
    known = getattr(builtins, kind, None)
    if isinstance(known, type) and issubclass(known, Exception):
        with suppress(TypeError):  # some want more than a text
            return known(text)
    return RuntimeError(f"{kind}: {text}")


def _number(value: object) -> int:
    if isinstance(value, _StandIn):
        return value._number
    raise TypeError(f"a {type(value).__name__} of the tests cannot be given to the program")


def _become(one: object, changed: object) -> None:
    """What the program did to a list, a dictionary or a set that it was given."""
    if isinstance(one, list) and isinstance(changed, list):
        one[:] = changed
    elif isinstance(one, dict | set) and type(one) is type(changed):
        one.clear()
        one.update(changed)
