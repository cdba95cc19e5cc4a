"""A rule in a process of its own: one that loops, exits, crashes or eats memory fails for one answer and no more.

A call that takes too long is ended with its process and all that this started, and the next answer gets a new one.
Lines of JSON go through two pipes, so nothing that comes back can run here. The process sees the user's environment,
files and network: this protects a run from mistakes, and `sandbox.py` from malice. POSIX only.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from luthier.errors import RecipeError
from luthier.recipe.rewards import AnyReward
from luthier.rollout.scoring import Answered, Failure, Score

__all__ = ["Isolated", "isolated_function", "isolated_rule", "start_of"]

_START_SECONDS = 120.0
_LONGEST_WAIT_SECONDS = 86400.0  # poll knows no longer times than some days
_PIECE_BYTES = 2**16
_RULE_BYTES = 2 * 2**30


def isolated_function(place: str, *, timeout_seconds: float = 10.0, memory_bytes: int = 8 * 2**30) -> "Isolated":
    """The function that `file.py:function` names. Raises RecipeError where there is none."""
    return Isolated({"function": place}, timeout_seconds=timeout_seconds, memory_bytes=memory_bytes)


def isolated_rule(settings: AnyReward, *, timeout_seconds: float) -> "Isolated":
    """The rule by its settings. Raises RecipeError where it needs what is not there."""
    task = {"reward": settings.model_dump(mode="json")}
    return Isolated(task, timeout_seconds=timeout_seconds, memory_bytes=_RULE_BYTES)


def start_of(module: str) -> str:
    """Python text that runs a module's `main`, from wherever this package lies."""
    return f"import sys; sys.path.append({str(Path(__file__).parents[2])!r}); from {module} import main; main()"


class Isolated:
    """task: the rule, as the worker reads it. timeout_seconds: of one answer. memory_bytes: of the process's own data.

    Starts at once, and raises RecipeError where that fails. Ends when it is closed, or no longer used.
    """

    def __init__(self, task: Mapping[str, Any], *, timeout_seconds: float, memory_bytes: int) -> None:
        self.timeout_seconds = timeout_seconds
        self._task = {**task, "timeout_seconds": timeout_seconds, "memory_bytes": memory_bytes}
        self._start()

    def score(self, answered: Sequence[Answered]) -> list[Score]:
        """The number of each answer, in their order, one after the other."""
        return [self._score(one) for one in answered]

    def close(self) -> None:
        """Ends the process, and all that it started."""
        self._end()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", start_of("luthier.rollout.worker")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        self._end = weakref.finalize(self, _end, self._process)
        try:
            said = self._exchange(self._task, _START_SECONDS)
        except (EOFError, TimeoutError) as error:
            self._end()
            why = f"took over {_START_SECONDS:g} seconds" if isinstance(error, TimeoutError) else str(error)
            raise RecipeError(f"{self._named}: its process did not start ({why}); try it by itself") from error
        if "refused" in said:
            self._end()
            raise RecipeError(said["refused"])

    @property
    def _named(self) -> str:
        return str(self._task.get("function") or f"reward {self._task['reward']['type']}")

    def _score(self, one: Answered) -> Score:
        try:
            if self._process.poll() is not None:
                self._end()
                self._start()
            said = self._exchange(_plain(one), self.timeout_seconds)
        except RecipeError as error:
            return Failure("did not start", str(error))
        except TimeoutError:
            self._end()
            return Failure("timed out", f"no number within {self.timeout_seconds:g} seconds")
        except EOFError as error:
            self._end()
            return Failure("ended its process", str(error))
        except (TypeError, ValueError, RecursionError) as error:
            return Failure("cannot be written as JSON", str(error))
        return float(said["number"]) if "number" in said else Failure(said["reason"], said["detail"])

    def _exchange(self, asked: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """One line there and one back. Raises TimeoutError, and EOFError where the process is no more."""
        line, deadline = json.dumps(asked, default=str).encode() + b"\n", time.monotonic() + seconds
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            _write(self._process.stdin.fileno(), line, deadline)
            reply = _read_line(self._process.stdout.fileno(), deadline)
        except (BrokenPipeError, EOFError):
            raise EOFError(f"exit status {self._process.wait()}") from None
        said: dict[str, Any] = json.loads(reply)
        return said


def _plain(one: Answered) -> dict[str, Any]:
    """What JSON has no word for, such as a date, goes as text."""
    prompt = [{"role": message.role, "content": message.content} for message in one.prompt]
    return {"prompt": prompt, "answer": one.answer, "row": dict(one.row)}


def _write(pipe: int, line: bytes, deadline: float) -> None:
    os.set_blocking(pipe, False)
    left = memoryview(line)
    while left:
        _wait(pipe, select.POLLOUT, deadline)
        left = left[os.write(pipe, left[:_PIECE_BYTES]) :]


def _read_line(pipe: int, deadline: float) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        _wait(pipe, select.POLLIN, deadline)
        piece = os.read(pipe, _PIECE_BYTES)
        if not piece:
            raise EOFError
        line += piece
    return line


def _wait(pipe: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(pipe, event)
    if not poll.poll(min(max(0.0, deadline - time.monotonic()), _LONGEST_WAIT_SECONDS) * 1000):
        raise TimeoutError


def _end(process: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    process.wait()
