"""Whether an answer's program passes tests, found out where it can do no harm.

Two processes are started for each answer, both with empty folders and environments, limits, and all that
`confinement.py` closes. The program runs in one; the tests run in the other, hear of the program's values over a pipe,
and write what passes to a pipe that the program does not have, so it cannot forge a verdict. Output goes nowhere. When
time is up both are killed with all that they started; a program that loops has failed its tests, and is no failure of
the reward.
"""

import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from luthier.data.strict_json import describe
from luthier.recipe.rewards import CodeReward
from luthier.rollout.isolated import start_of
from luthier.rollout.scoring import Answered, Failure, Score
from luthier.rollout.workers import workers

__all__ = ["Exam", "num_passed", "program_in", "scored_by_tests"]

_FENCE = "```"
_PYTHON = ("python", "python3", "py")
_NOT_STARTED = "sandbox did not start"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Exam:
    """Python texts, each of which passes if it raises nothing. entry_point: what their check(candidate) is given."""

    tests: tuple[str, ...]
    entry_point: str | None = None
    timeout_seconds: float = 10.0
    memory_bytes: int = 2**30


def scored_by_tests(settings: CodeReward, answered: Sequence[Answered]) -> list[Score]:
    """1 if all tests pass and else 0, or the share that passes, for each answer in their order."""
    with workers(settings.parallel, "tests") as pool:
        return list(pool.map(partial(_score, settings), answered))


def num_passed(program: str, exam: Exam) -> int | Failure:
    """How many of the tests the program passes within the time, or why they could not be run."""
    folder = Path(tempfile.mkdtemp(prefix="luthier-tests-"))
    try:
        lines, in_time = _examined(program, exam, folder)
    except OSError as error:
        return Failure(_NOT_STARTED, str(error))
    finally:
        with suppress(RecursionError):
            shutil.rmtree(folder, ignore_errors=True)
    if not lines:
        limit = f"no sign within {exam.timeout_seconds:g} seconds"
        return Failure(_NOT_STARTED, "its processes ended early" if in_time else limit)
    if "broken" in lines[0]:
        return Failure("broken tests", lines[0]["broken"])
    _say_what_is_open(tuple(lines[0]["closed"]))
    return sum(bool(line["passed"]) for line in lines[1:])


def program_in(answer: str) -> str:
    """The last fenced block that says it is Python, or else the last one, or else the whole answer."""
    blocks: list[tuple[str, list[str]]] = []
    inside = False
    for line in answer.split("\n"):
        if line.strip().startswith(_FENCE):
            inside = not inside
            if inside:
                blocks.append((line.strip().removeprefix(_FENCE).strip().lower(), []))
        elif inside:
            blocks[-1][1].append(line)
    closed = blocks[:-1] if inside else blocks
    python = [lines for kind, lines in closed if kind in _PYTHON]
    chosen = python or [lines for _, lines in closed]
    return textwrap.dedent("\n".join(chosen[-1])) if chosen else answer


def _score(settings: CodeReward, one: Answered) -> Score:
    exam = _exam(settings, one.row)
    passed = exam if isinstance(exam, Failure) else num_passed(program_in(one.answer), exam)
    if isinstance(exam, Failure) or isinstance(passed, Failure):
        return passed
    return passed / len(exam.tests) if settings.score == "share" else float(passed == len(exam.tests))


def _exam(settings: CodeReward, row: Mapping[str, Any]) -> Exam | Failure:
    value = row.get(settings.column)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        return Failure(f'no tests in column "{settings.column}"', f"it is {describe(value)}")
    entry_point = None if settings.entry_point is None else row.get(settings.entry_point)
    if settings.entry_point is not None and not isinstance(entry_point, str):
        return Failure(f'no name in column "{settings.entry_point}"', f"it is {describe(entry_point)}")
    return Exam(tuple(texts), entry_point, settings.timeout_seconds, int(settings.memory_gb * 2**30))


def _examined(program: str, exam: Exam, folder: Path) -> tuple[list[dict[str, Any]], bool]:
    """What the examiner wrote, and whether it came to its end. Raises OSError where no process can be started."""
    task = {"program": program, "tests": exam.tests, "entry_point": exam.entry_point}
    limits = (str(exam.memory_bytes), str(math.ceil(exam.timeout_seconds) + 1))
    with ExitStack() as processes:
        with ExitStack() as ends:
            asked, ask, told, tell = _pipes(ends)
            own, others = folder / "program", folder / "tests"
            candidate = _start("candidate", own, [str(own), *limits], stdin=asked, stdout=tell)
            processes.callback(_end, candidate)
            arguments = [str(ask), str(told), str(others), *limits]
            examiner = _start("examiner", others, arguments, pass_fds=(ask, told))
            processes.callback(_end, examiner)
        try:
            said, _ = examiner.communicate(json.dumps(task).encode(), timeout=exam.timeout_seconds)
            in_time = True
        except subprocess.TimeoutExpired:
            _kill(examiner)
            said, in_time = examiner.communicate()[0], False
    return [json.loads(line) for line in said.split(b"\n")[:-1]], in_time


def _pipes(ends: ExitStack) -> list[int]:
    """Two pipes, each from where it is read to where it is written, closed here in the end."""
    found = [*os.pipe(), *os.pipe()]
    for end in found:
        ends.callback(os.close, end)
    return found


def _start(
    name: str,
    folder: Path,
    arguments: Sequence[str],
    *,
    stdin: int = subprocess.PIPE,
    stdout: int = subprocess.PIPE,
    pass_fds: Sequence[int] = (),
) -> "subprocess.Popen[bytes]":
    """A Python process in an empty folder, without the user's environment, in a session of its own."""
    folder.mkdir()
    libraries = {
        key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ
    }  # Python's own may lie there
    return subprocess.Popen(
        [sys.executable, "-I", "-c", start_of(f"luthier.rollout.{name}"), *arguments],
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.DEVNULL,
        pass_fds=pass_fds,
        cwd=folder,
        env={"OMP_NUM_THREADS": "1", **libraries},
        start_new_session=True,
    )


def _kill(process: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _end(process: "subprocess.Popen[bytes]") -> None:
    _kill(process)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    process.wait()


@cache
def _say_what_is_open(closed: tuple[str, ...]) -> None:
    """Once for a run, what programs could reach on this machine."""
    reach = {"files": "read the user's files", "processes": "use the network, start processes and send signals"}
    found = [what for name, what in reach.items() if name not in closed]
    if found:
        _log.warning("programs under test can %s here: this kernel offers no way to refuse it", " and ".join(found))
