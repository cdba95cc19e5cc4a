"""How many tokens a forward pass may have: what the memory plan allows, and less once memory has run out after all.

What was too much is cut smaller and done once more. Cutting changes no gradient, so the step is the step that it was.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from luthier.errors import MemoryPlanError
from luthier.recipe.training import Training
from luthier.shortage import again_with_less
from luthier.training.state import Progress

__all__ = ["Room"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
Sizes = Callable[[], Iterable[int]]
"""The tokens of each pass of some work, as it is cut now."""


@dataclass(frozen=True, slots=True)
class Room:
    """The bound on a micro-batch. most: in the beginning; None for no bound. progress: of the run, which has the bound
    once memory has run out, so that a run that goes on keeps it.
    """

    settings: Training
    most: int | None
    progress: Callable[[], Progress]

    @property
    def tokens(self) -> int | None:
        """The bound by now."""
        return self.progress().micro_batch_tokens or self.most

    def fitting(self, work: Callable[[], T], sizes: Sizes) -> T:
        """What `work` gives, which cuts by `tokens` and can begin anew: where memory runs out, it does with less.

        Raises MemoryPlanError where the largest pass cannot be cut.
        """
        return again_with_less(work, partial(self._give_way, sizes))

    def _give_way(self, sizes: Sizes, said: str) -> None:
        largest = max(sizes())
        tokens = min(self.tokens or largest, largest)
        while tokens > 1:
            tokens //= 2
            self.progress().micro_batch_tokens = tokens
            if max(sizes()) < largest:
                logger.warning("memory has run out (%s); going on with micro-batches of up to %d tokens", said, tokens)
                return
        raise MemoryPlanError(
            f"memory has run out in a pass of {largest} tokens that cannot be cut ({said}); set "
            f"{_mend(self.settings)}, or ask `luthier plan`; the last good checkpoint is kept"
        )


def _mend(settings: Training) -> str:
    """A setting with which a pass takes less."""
    if not settings.gradient_checkpointing:
        return "gradient_checkpointing: 1"
    return f"max_length under {settings.max_length}"
