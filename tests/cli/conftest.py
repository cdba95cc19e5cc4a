"""The command in a process of its own, as a user starts it, for what only such a one can show."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def started() -> Iterator[Start]:
    """Starts commands in the current folder, and sees that they end with the test."""
    processes: list[subprocess.Popen[str]] = []

    def start(*arguments: str, limit_bytes: int | None = None) -> subprocess.Popen[str]:
        """One that can write no file that is longer than the limit. It hears Ctrl-C also where the tests run in a
        script's background, which does not.
        """

        def limit() -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if limit_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

        command = [sys.executable, "-m", "luthier.cli.main", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, env=environment, text=True, preexec_fn=limit, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()
