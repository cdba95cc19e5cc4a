"""Ctrl-C, and the SIGTERM that clusters and containers send before they kill, asked of the run as a wish to end.

The first of them is passed on to whoever trains, who finishes the step and writes a checkpoint. The second ends the
process at once, which costs no more than the steps since the last checkpoint. A signal that was ignored stays ignored.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from luthier.training.stopping import Stop

__all__ = ["Heard", "heard"]

_WORDS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Heard:
    """Which of the signals came first."""

    first: signal.Signals = signal.SIGINT

    @property
    def exit_code(self) -> int:
        """As a shell gives it for a process that the signal has ended."""
        return 128 + self.first

    def sentence(self) -> str:
        """How the command ended."""
        how = "interrupted" if self.first == signal.SIGINT else "ended by SIGTERM"
        return f"{how}; run the same command again to go on"


@contextmanager
def heard(stop: Stop) -> Iterator[Heard]:
    """For the time of the context both signals ask `stop`. Only a process's main thread can listen."""
    found = Heard()

    def hear(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        found.first = signal.Signals(number)
        stop.ask()
        word = _WORDS[found.first]  # where it does not come at once; no stream, which this may have cut in on
        os.write(2, f"luthier: {word}: the step is finished and saved; once more ends at once\n".encode())

    listening = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in _WORDS}
    for number, handler in before.items():
        if listening and handler not in (signal.SIG_IGN, None):
            signal.signal(number, hear)
    try:
        yield found
    finally:
        for number, handler in before.items():
            if listening and handler is not None:
                signal.signal(number, handler)
