"""Which answers to a prompt are kept as examples, and what is told of them and of the others.

Keeping all that reach a reward is rejection sampling, keeping the best of n is best-of-n. Whatever its reward, an
answer is kept only where it can be learned: one that is empty would be refused when it is read, and one that was cut
off would teach to stop in the middle of a sentence.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from luthier.data.conversations import text_of
from luthier.errors import DataError
from luthier.recipe.sampling import AnswerSampling

__all__ = ["SampleCounts", "ScoredText", "pick"]


@dataclass(frozen=True, slots=True)
class ScoredText:
    """An answer that has a reward. finished: it ended by itself, and not because it was as long as it may be."""

    text: str
    finished: bool
    reward: float


@dataclass(frozen=True, slots=True)
class SampleCounts:
    """What became of rows, prompts and answers: answers = scored + failed, and scored = kept + dropped.

    prompts: that say something else than those before them; repeated: the other good rows. unanswered, failed, dropped:
    prompts without answers, answers without a reward, and others that are not kept, each by reason. mean_reward: of all
    answers that are scored; mean_kept_reward: of those that are kept.
    """

    bad_rows: int
    repeated: int
    prompts: int
    unanswered: dict[str, int]
    answers: int
    scored: int
    failed: dict[str, int]
    kept: int
    dropped: dict[str, int]
    mean_reward: float
    mean_kept_reward: float


def pick(answers: Sequence[ScoredText], settings: AnswerSampling) -> tuple[list[ScoredText], Counter[str]]:
    """Of the answers to one prompt those that are kept, in their order, and why the others are not."""
    faults = [_fault(one, settings) for one in answers]
    fitting = [one for one, fault in zip(answers, faults, strict=True) if fault is None]
    dropped = Counter(fault for fault in faults if fault is not None)
    if settings.keep == "best":
        kept = sorted(fitting, key=lambda one: -one.reward)[:1]  # the first of equals: sorting keeps their order
        reason = "not the best"
    else:
        first: dict[str, ScoredText] = {}
        for one in fitting:
            first.setdefault(one.text, one)
        kept, reason = [*first.values()], "said before"
    dropped[reason] += len(fitting) - len(kept)
    return kept, +dropped


def _fault(answer: ScoredText, settings: AnswerSampling) -> str | None:
    """Why an answer cannot be kept, whatever the others are."""
    try:
        text_of("an answer", answer.text)
    except DataError:
        return "empty or unreadable"
    if not (answer.finished or settings.keep_truncated):
        return "cut off at max_new_tokens"
    if settings.min_reward is not None and answer.reward < settings.min_reward:
        return "below min_reward"
    return None
