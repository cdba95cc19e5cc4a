"""An end that is asked for from outside, as by a signal, and that costs nothing of what was trained.

A step that has begun is finished, with what belongs to it, and a checkpoint is written; then the run ends. Where no
weight changes the end comes at once: while answers are sampled and evaluations made, and outside the loop, where what
was half done is done again. Nothing here listens to signals: whoever does, asks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Stop", "Stopped"]


class Stopped(KeyboardInterrupt):
    """The end that was asked for. As Ctrl-C, it is no error, and nobody takes it for one."""


class Stop:
    """A callback through which a run can be asked to end. One may serve several stages, one after the other."""

    def __init__(self) -> None:
        self.asked = self._held = False
        self.cut_in = False
        """Whether the end came at once, amid whatever ran: a library may have made an error of its own of it."""

    def ask(self) -> None:
        """Asks for the end. Raises Stopped where it can come at once."""
        self.asked = True
        if not self._held:
            self.cut_in = True
            raise Stopped

    @contextmanager
    def held(self) -> Iterator[None]:
        """For the time of the context what has begun is finished; Stopped is raised at its end if it was asked for."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self.asked:
            raise Stopped

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within what is held: for the time of the context the end comes at once."""
        try:
            self._held = False
            if self.asked:
                raise Stopped
            yield
        finally:
            self._held = True

    def on_start(self, step: int, num_steps: int) -> None:
        """Nothing to prepare."""

    def on_metrics(self, metrics: dict[str, Any]) -> None:
        """Nothing to note."""

    def on_end(self) -> None:
        """Nothing to close."""
