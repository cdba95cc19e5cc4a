"""Who listens to a run: the metrics file, trackers, a screen. The loop calls; nobody here changes the training."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from luthier.errors import CheckpointError
from luthier.files import naming, write_whole

__all__ = ["Callback", "Metrics", "MetricsFile", "complete", "read_metrics", "total_of"]

Metrics = dict[str, Any]


class Callback(Protocol):
    """Told of each event of a run. Metrics hold plain numbers and always `step`."""

    def on_start(self, step: int, num_steps: int) -> None:
        """The first step to come is `step`, counted from 0; more than 0 for a run that goes on. Told once more, after
        `on_end`, where a run goes back to an earlier step.
        """

    def on_metrics(self, metrics: Metrics) -> None:
        """A step or an evaluation is over."""

    def on_end(self) -> None:
        """The run is over, also when it was interrupted, or goes back."""


class MetricsFile:
    """metrics.jsonl: one JSON object a line. A run that goes on drops the lines of steps that it will do again.

    JSON has no word for a number that is not finite; it stands there as null, and `read_metrics` gives nan.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_start(self, step: int, num_steps: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(self.path) if line["step"] <= step] if step else []
        write_whole(self.path, "".join(map(_line, kept)))
        self.file = self.path.open("a", encoding="utf-8")

    def on_metrics(self, metrics: Metrics) -> None:
        with naming(self.path):
            self.file.write(_line(metrics))
            self.file.flush()

    def on_end(self) -> None:
        with suppress(OSError):  # of a line that found no room, which has been said
            self.file.close()


def read_metrics(path: Path) -> list[Metrics]:
    """The lines of a metrics file; a last line that a kill cut short is left out. Raises CheckpointError for another
    that holds no numbers.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [_numbers(line, f"{path}:{number}") for number, line in enumerate(lines[:-1], start=1) if line]


@contextmanager
def complete(path: Path) -> Iterator[None]:
    """Says of lines that were read from the file, where a name is missing that each has, that they are damaged. Raises
    CheckpointError.
    """
    try:
        yield
    except LookupError as error:
        raise CheckpointError(
            f"{path}: a line is damaged ({error}); delete it, and its numbers alone are lost"
        ) from None


def _numbers(line: bytes, where: str) -> Metrics:
    try:
        found = json.loads(line)
        if isinstance(found, dict) and isinstance(found.get("step"), int):
            return {name: math.nan if value is None else value for name, value in found.items()}
    except ValueError:
        pass
    raise CheckpointError(f"{where}: this line is damaged; delete it, and its numbers alone are lost")


def total_of(lines: Sequence[Metrics], name: str) -> float | None:
    """The sum over all lines; None where one of them does not tell it, for the sum would be of a part."""
    return math.fsum(line[name] for line in lines) if all(name in line for line in lines) else None


def _line(metrics: Metrics) -> str:
    lost = {name: None for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)}
    return json.dumps(metrics | lost, allow_nan=False) + "\n"
