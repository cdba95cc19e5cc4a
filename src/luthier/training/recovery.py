"""Going back: a run whose steps fail one after the other goes on from a checkpoint before them, without their data.

A gradient that is not finite changes nothing, so a single one is left out and forgotten. Several in a row say that the
weights are on a bad way. PaLM was then started again from before, and what it had seen before and during the trouble
was left out: it took these batches and those weights together to go wrong (Chowdhery et al. 2022, section 5.1). To
repeat the same steps on the same data would lead to the same place, so the ten steps before the first that failed, as
many as AdamW's mean of gradients remembers, are left out too. What is left out stands in the progress, so it is left
out by a run that is killed and goes on, as well.
"""

import logging

from luthier.errors import TrainingError
from luthier.training.checkpoints import Checkpoints
from luthier.training.state import TrainState

__all__ = ["MOST_FAILED", "go_back_before_failure"]

logger = logging.getLogger(__name__)

MOST_FAILED = 3
"""So many steps in a row that fail are no longer single bad rows."""

_BEFORE = 10  # steps that are left out before the first that failed: 1 / (1 - beta1)
_MEND = "lower learning_rate, or set dtype: fp32"


def go_back_before_failure(state: TrainState, checkpoints: Checkpoints | None, what: str, *, num_steps: int) -> None:
    """Puts the state back to the last good checkpoint, with the steps that failed to be left out from there.

    what: went wrong, by the step that the progress is at. Raises TrainingError where there is nothing to go back to,
    nothing left to train on, or no good step was saved since the run went back before.
    """
    progress = state.progress
    first = max(0, progress.step - max(1, progress.skipped_steps))
    good = checkpoints.newest_good(first) if checkpoints else None
    sentence = f"step {progress.step}: {what}"
    if checkpoints is None or good is None:
        raise TrainingError(f"{sentence}, and there is no checkpoint to go back to; {_MEND}")
    path, saved_step = good
    if progress.left_out and saved_step <= progress.left_out[-1] + 1:
        raise TrainingError(f"{sentence}, soon after the run went back for it; {_MEND}; {path} is the last good one")
    failed = range(max(saved_step, first - _BEFORE), progress.step)
    if len(failed) == num_steps:
        raise TrainingError(f"{sentence}, and no step is left without them; {_MEND}")
    logger.warning(
        "%s; going back to %s, and from there without steps %d to %d; if that helps, look at their rows, else %s",
        *(sentence, path.name, failed.start + 1, failed.stop, _MEND),
    )
    checkpoints.go_back_to(path, state, leaving_out=failed)
