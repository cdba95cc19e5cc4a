"""Whether a probability means what it says: of the pairs that a model calls 80% sure, 80% should be right."""

from collections.abc import Sequence
from math import exp

__all__ = ["calibration_error"]


def calibration_error(margins: Sequence[float], *, num_bins: int = 10) -> float:
    """sum over bins of n_b / n |share right - mean confidence|        Guo et al. 2017, eq. 3

    margins: of pairs, the better answer's reward less the worse one's. The model's confidence in the answer that it
    prefers is s(|margin|), from 0.5 to 1, which bins of equal width divide; it is right where the margin is positive,
    and half right where it is 0. Between 0 and 1; 0 without pairs.
    """
    bins: list[list[tuple[float, float]]] = [[] for _ in range(num_bins)]
    for margin in margins:
        confidence = 1 / (1 + exp(-min(abs(margin), 700.0)))
        place = min(int((confidence - 0.5) * 2 * num_bins), num_bins - 1)
        bins[place].append((confidence, 0.5 if margin == 0 else float(margin > 0)))
    gaps = (abs(sum(right for _, right in one) - sum(sure for sure, _ in one)) for one in bins)
    return sum(gaps) / max(1, len(margins))
