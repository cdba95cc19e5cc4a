"""When a gradient's norm is a spike: one rule, for the diagnosis that tells of it and the step that is left out for it.

The rule looks at the norms before, which are known when a step begins. So the device can decide whether to take the
step, and the program waits for nothing. Norms of steps that were left out count too: where the usual has changed, the
rule learns it within 25 steps.
"""

import math
from collections.abc import Sequence
from statistics import median

__all__ = ["USUAL_FACTOR", "is_spike", "remembered", "spike_bound"]

USUAL_FACTOR = 10.0
_FIRST, _RECENT = 20, 50  # of the norms before, that are looked at


def spike_bound(before: Sequence[float], factor: float = USUAL_FACTOR) -> float:
    """The norm over which a gradient is a spike: factor times the median of the 50 before it, and at least that of the
    run's first 20; inf as long as these are not there. before: all norms, or what `remembered` keeps of them.
    """
    if len(before) < _FIRST:
        return math.inf
    return max(factor * median(before[-_RECENT:]), median(before[:_FIRST]))


def is_spike(norm: float, before: Sequence[float], factor: float = USUAL_FACTOR) -> bool:
    """Whether a norm lies over `spike_bound`."""
    return norm > spike_bound(before, factor)


def remembered(before: Sequence[float], norm: float) -> list[float]:
    """What the rule has to know of the norms once this one is there too, which none is that is not finite."""
    if not math.isfinite(norm):
        return list(before)
    kept = [*before, norm]
    return kept if len(kept) <= _FIRST + _RECENT else [*kept[:_FIRST], *kept[-_RECENT:]]
