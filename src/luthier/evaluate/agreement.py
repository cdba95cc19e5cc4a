"""How far a judge agrees with people: the share of equal verdicts, and Cohen's kappa, which takes out chance."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

from luthier.evaluate.verdicts import Outcome, Verdict

__all__ = ["Agreement", "agreement"]


@dataclass(frozen=True, slots=True)
class Agreement:
    """rate: the share of equal verdicts among the num_compared that the judge gave; kappa: 0 by chance, 1 always."""

    num_compared: int
    num_failed: int
    rate: float
    kappa: float


def agreement(verdicts: Sequence[Verdict], labels: Sequence[Outcome]) -> Agreement:
    """kappa = (p_o - p_e) / (1 - p_e)        Cohen 1960

    p_o: the share of questions on which the two agree. p_e: the share on which they would by chance, the sum over
    first, second and tie of the product of how often either says it. labels: what people say, in the verdicts' order.
    Failed verdicts are left out. rate and kappa are nan without any verdict, kappa too where both say one word alone.
    """
    said = [(v.outcome, label) for v, label in zip(verdicts, labels, strict=True) if v.outcome != "failed"]
    total, num_failed = len(said), len(verdicts) - len(said)
    if not said:
        return Agreement(0, num_failed, nan, nan)
    observed = sum(ours == theirs for ours, theirs in said) / total
    ours, theirs = (Counter(side) for side in zip(*said, strict=True))
    by_chance = sum(ours[word] * theirs[word] for word in ours) / total**2
    kappa = nan if by_chance == 1 else (observed - by_chance) / (1 - by_chance)
    return Agreement(total, num_failed, observed, kappa)
