"""What a run's numbers say of it: flat, rising, swinging, learned by heart, not finite, a spike; with cause and mend.

Each sign is a pure function of a list of numbers that says whether it is there, and is slow to say so: noise must not
set it off. A callback keeps the lists and says each sign once. Where a loss is no measure of success, as that of a
policy's surrogate, its curve is not looked at.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median, stdev, variance

from luthier.training.callbacks import Metrics, complete, read_metrics
from luthier.training.spikes import is_spike

__all__ = ["Diagnosis", "is_flat", "learns_by_heart", "rises", "swings"]

logger = logging.getLogger(__name__)

_BLOCK = 5  # losses of which the median stands for all
_RECENT = 200  # losses that are looked at


def is_flat(losses: Sequence[float]) -> bool:
    """No fall from the first third of the losses to the last that noise would not explain, nor room for one.

    With the means m_1 and m_3 of these thirds and the standard error e of their difference, -2e <= m_1 - m_3 <= e, and
    m_1 - m_3 + 2e < 0.03 m_1. Of fewer than 30 losses nothing is said.
    """
    third = len(losses) // 3
    if third < 10:
        return False
    first, last = losses[:third], losses[-third:]
    fall, error = fmean(first) - fmean(last), math.sqrt((variance(first) + variance(last)) / third)
    return -2 * error <= fall <= error and fall + 2 * error < 0.03 * fmean(first)


def rises(losses: Sequence[float]) -> bool:
    """Each of the last four blocks lies a step above the lowest block before them, and above the first loss of all
    where that is lower. A block is the median of five losses, a step the greater of a fifth of the first loss and four
    deviations within blocks.
    """
    blocks, step = _blocks(losses)
    return len(blocks) > 4 and min(blocks[-4:]) > min(losses[0], *blocks[:-4]) + step


def swings(losses: Sequence[float]) -> bool:
    """The blocks of `rises` have gone up by a step and down by a step again three times."""
    blocks, step = _blocks(losses)
    lowest = highest = blocks[0] if blocks else 0.0
    going_up, num_swings = False, 0
    for block in blocks:
        lowest, highest = min(lowest, block), max(highest, block)
        if not going_up and block > lowest + step:
            going_up, highest = True, block
        elif going_up and block < highest - step:
            going_up, lowest, num_swings = False, block, num_swings + 1
    return num_swings >= 3


def _blocks(losses: Sequence[float]) -> tuple[list[float], float]:
    """Medians of the recent losses by blocks, whole ones alone, and how far apart two have to be to differ."""
    recent = losses[-_RECENT:]
    cut = [recent[end - _BLOCK : end] for end in range(len(recent) % _BLOCK + _BLOCK, len(recent) + 1, _BLOCK)]
    if not cut:
        return [], math.inf
    return [median(block) for block in cut], max(0.2 * abs(losses[0]), 4 * median(map(stdev, cut)))


def learns_by_heart(held_out: Sequence[float], trained: Sequence[float]) -> bool:
    """The last three held-out losses are over the lowest before them, by 2% of the first, and the training loss since
    the last evaluation is under that lowest one, and under what it was itself before that.

    held_out: of each evaluation, the one before the first step among them. trained: the mean training loss between an
    evaluation and the one before it; nan before the first.
    """
    if len(held_out) < 4:
        return False
    best = min(range(len(held_out) - 3), key=lambda index: held_out[index])
    lowest, before = held_out[best], trained[max(best, 1)]
    return min(held_out[-3:]) > lowest + 0.02 * abs(held_out[0]) and trained[-1] < min(lowest, before)


class Diagnosis:
    """Says once of each sign what it is likely to come from, and what to do.

    path: of the metrics file, from which a run that goes on takes what was before. falls: whether the loss is a measure
    of success.
    """

    def __init__(self, path: Path, *, falls: bool = True) -> None:
        self.path, self.falls = path, falls

    def on_start(self, step: int, num_steps: int) -> None:
        """Takes up what there was until now, and what was said of it."""
        self.num_steps = num_steps
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.held_out: list[float] = []
        self.trained: list[float] = []
        self.since = 0  # losses at the last evaluation
        self.told: set[str] = set()
        with complete(self.path):
            for line in read_metrics(self.path) if step else []:
                if line["step"] <= step:
                    self.told |= self._found(line).keys()

    def on_metrics(self, metrics: Metrics) -> None:
        """Looks at the numbers of a step or an evaluation."""
        for kind, sentence in self._found(metrics).items():
            if kind not in self.told:
                self.told.add(kind)
                logger.warning("step %d: %s", metrics["step"], sentence)

    def on_end(self) -> None:
        """Nothing to close."""

    def _found(self, metrics: Metrics) -> dict[str, str]:
        """The signs, by their kinds, that there are with these numbers."""
        if "eval_loss" in metrics:
            return self._of_evaluation(metrics["eval_loss"]) if self.falls else {}
        if not {"loss", "grad_norm"} <= metrics.keys():
            return {}
        return self._of_norm(metrics) | (self._of_curve(metrics) if self.falls else {})

    def _of_evaluation(self, loss: float) -> dict[str, str]:
        lately = self.losses[self.since :]
        if not math.isfinite(loss):
            return {}
        self.held_out.append(loss)
        self.trained.append(fmean(lately) if lately else self.trained[-1] if self.trained else math.nan)
        self.since = len(self.losses)
        if not learns_by_heart(self.held_out, self.trained):
            return {}
        return {
            "by heart": f"the held-out loss has risen from {min(self.held_out):.3f} to {loss:.3f} while the training "
            "loss falls, so the rows are learned by heart; take fewer epochs, early_stopping, more data or a lower r"
        }

    def _of_norm(self, metrics: Metrics) -> dict[str, str]:
        norm, loss, before = metrics["grad_norm"], metrics["loss"], self.norms[-50:]
        if math.isfinite(loss) and not math.isfinite(norm) and "loss_scale" in metrics:
            return {}  # the scale is sought by overflowing
        if not (math.isfinite(norm) and math.isfinite(loss)):
            return {"not finite": _not_finite(loss, norm, started=bool(self.norms))}
        spike = is_spike(norm, self.norms)
        self.norms.append(norm)
        if not spike:
            return {}
        return {
            "spike": f"the gradient's norm is {norm:.3g} where {median(before):.3g} is usual: a row unlike others, or "
            f"learning_rate ({metrics['learning_rate']:.2g} now) is too high; look at the data, and set max_grad_norm "
            "near what is usual, or max_grad_spike: 10, which leaves such steps out"
        }

    def _of_curve(self, metrics: Metrics) -> dict[str, str]:
        loss, rate = metrics["loss"], f"learning_rate ({metrics['learning_rate']:.2g} now)"
        if not math.isfinite(loss):
            return {}
        self.losses.append(loss)
        found: dict[str, str] = {}
        if len(self.losses) % max(1, self.num_steps // 3) == 0 and is_flat(self.losses):
            found["flat"] = (
                f"the training loss is {loss:.3f} and has not fallen since the start: {rate} is too low, or too little "
                "is trained; raise it threefold, or raise r or the number of target_modules"
            )
        if len(self.losses) % _BLOCK:
            return found
        mend = f"{rate} is too high; lower it to a third, or raise warmup_ratio or batch_size"
        if rises(self.losses):
            found["rises"] = f"the training loss is {loss:.3f} and stays over what it was: {mend}"
        if swings(self.losses):
            found["swings"] = f"the training loss goes up and down, {loss:.3f} now: {mend}"
        return found


def _not_finite(loss: float, norm: float, *, started: bool) -> str:
    where = f"the loss is {loss}" if not math.isfinite(loss) else f"the loss is {loss:.3f}, but its gradient {norm}"
    if not started:
        return f"{where} before anything was trained: numbers overflow in the model's type; set dtype: fp32"
    return f"{where}: the weights have grown until numbers overflow; lower learning_rate or set dtype: fp32"
