"""When a server that gives no answers is given up: each further question would cost its timeouts."""

from dataclasses import dataclass, field
from threading import Lock

__all__ = ["Patience"]


@dataclass(slots=True)
class Patience:
    """Counts how many questions in a row got no answer, over all threads; `most` of them and it is lost for good."""

    most: int
    num_failures: int = 0
    lock: Lock = field(default_factory=Lock)

    @property
    def is_lost(self) -> bool:
        return self.num_failures >= self.most

    def note(self, *, replied: bool) -> None:
        """What became of one question. Once lost, answers that were still under way change nothing."""
        with self.lock:
            if not self.is_lost:
                self.num_failures = 0 if replied else self.num_failures + 1
