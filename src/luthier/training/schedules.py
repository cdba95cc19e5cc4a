"""Learning-rate schedules: the share of the peak rate at each step, as pure functions of the step.

All rise linearly over the warm-up. Nothing is remembered from step to step, so there is no state to save.
"""

import math

from luthier.recipe.training import Training

__all__ = ["learning_rate_at"]


def learning_rate_at(step: int, num_steps: int, settings: Training) -> float:
    """The learning rate of step `step` (counted from 0) of `num_steps`.

    warm-up: (step + 1) / (warm-up steps + 1), so that the first step already learns. Then, with x the share of the
    remaining steps that is done: constant 1; linear 1 - x; cosine (1 + cos(pi x)) / 2 (Loshchilov and Hutter 2017,
    eq. 5); wsd 1 and, over the last decay_ratio of all steps, falling linearly to 0 (Hu et al. 2024, section 4).
    """
    warmup = math.ceil(settings.warmup_ratio * num_steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, num_steps - warmup)
    return settings.learning_rate * _share(done, step, num_steps, settings)


def _share(done: float, step: int, num_steps: int, settings: Training) -> float:
    if settings.schedule == "linear":
        return 1 - done
    if settings.schedule == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    if settings.schedule == "wsd":
        decay = max(1, math.ceil((settings.decay_ratio or 0) * num_steps))
        return min(1.0, (num_steps - step) / decay)
    return 1.0
