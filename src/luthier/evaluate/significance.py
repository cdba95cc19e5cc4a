"""How sure a count is: the share of comparisons that were won, and the fall of an accuracy, each with its error."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

from luthier.evaluate.verdicts import Verdict

__all__ = ["Fall", "WinRate", "fall_between", "wilson_interval", "win_rate"]


@dataclass(frozen=True, slots=True)
class WinRate:
    """The first answers' wins over the second ones. rate: between low and high, the ends of the interval."""

    wins: int
    ties: int
    losses: int
    rate: float
    low: float
    high: float

    def __str__(self) -> str:
        """One line: `57.5% (52.1 to 62.7), 190 wins, 30 ties, 130 losses`."""
        return (
            f"{100 * self.rate:.1f}% ({100 * self.low:.1f} to {100 * self.high:.1f}), "
            f"{self.wins} wins, {self.ties} ties, {self.losses} losses"
        )


@dataclass(frozen=True, slots=True)
class Fall:
    """How far an accuracy has fallen, as a share of the questions, and the standard error of that."""

    fall: float
    error: float

    def is_over(self, bound: float) -> bool:
        """Whether it has fallen by more than the bound, and by more than two standard errors, which chance may give."""
        return self.fall > max(bound, 2 * self.error)


def fall_between(before: Sequence[bool], after: Sequence[bool]) -> Fall:
    """(b - c) / n and sqrt(b + c - (b - c)^2 / n) / n        McNemar 1947: n questions that were answered twice

    b: of those answered rightly before, how many are not now; c: the other way round. Questions that are answered alike
    twice say nothing, so this error is much smaller than that of two accuracies on questions of their own.
    """
    num_questions = len(before)
    lost = sum(was and not now for was, now in zip(before, after, strict=True))
    won = sum(now and not was for was, now in zip(before, after, strict=True))
    spread = lost + won - (lost - won) ** 2 / num_questions
    return Fall((lost - won) / num_questions, sqrt(spread) / num_questions)


def win_rate(verdicts: Iterable[Verdict], *, confidence: float = 0.95) -> WinRate:
    """(wins + ties / 2) / (wins + ties + losses) of the first answers, failed ones left out, with Wilson's interval.

    Half points vary less than the whole ones that the interval supposes, so ties make it wider than it need be.
    Without any comparison the rate is 0.5, between 0 and 1.
    """
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    wins, ties, losses = (outcomes[outcome] for outcome in ("first", "tie", "second"))
    num_compared = wins + ties + losses
    points = wins + ties / 2
    low, high = wilson_interval(points, num_compared, confidence=confidence)
    return WinRate(wins, ties, losses, points / num_compared if num_compared else 0.5, low, high)


def wilson_interval(points: float, num_trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """(p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)        Wilson 1927

    p = points / n: the share of successes among n trials. z: the normal quantile of (1 + confidence) / 2.
    Without trials 0 to 1.
    """
    if num_trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p, weight = points / num_trials, z**2 / num_trials
    middle, reach = p + weight / 2, sqrt(weight * (p * (1 - p) + weight / 4))
    # rounding must not push the interval's end past a share of 0 or 1
    return max(0.0, min(p, (middle - reach) / (1 + weight))), min(1.0, max(p, (middle + reach) / (1 + weight)))
