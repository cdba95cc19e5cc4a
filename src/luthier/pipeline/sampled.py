"""Prompts answered and answers scored, batch by batch, each batch written down before the next.

A prompt that cannot be answered and an answer that cannot be scored are left out with their reasons, for this time.
What fails for every prompt or answer is not gone on with: a server that is silent, a reward that gives no number.
"""

import logging
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from luthier.data.examples import Prompt
from luthier.errors import TrainingError
from luthier.pipeline.sample_files import Answer, SampleFiles
from luthier.rollout.endpoint import is_silence
from luthier.rollout.requests import Engine, Request, Sampling
from luthier.rollout.rewards import Rewarder
from luthier.rollout.scoring import Answered, Failure, Score

__all__ = ["SampledPrompts", "by_reason"]

logger = logging.getLogger(__name__)

_AGAIN = "run the same command again, which samples nothing twice"


@dataclass(slots=True)
class SampledPrompts:
    """The prompts, and by their places what is known of them.

    answers, rewards: of those that are answered; a reward is None as long as it was not tried. unanswered: of the
    others that were asked.
    """

    prompts: Sequence[Prompt]
    requests: Sequence[Request]
    sampling: Sampling
    files: SampleFiles
    answers: dict[int, tuple[Answer, ...]] = field(init=False)
    rewards: dict[int, list[Score | None]] = field(init=False)
    unanswered: dict[int, Failure] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.answers, known = self.files.answers(), self.files.rewards()
        self.rewards = {place: [*known.get(place, [None] * len(some))] for place, some in self.answers.items()}

    @property
    def scores(self) -> list[float]:
        """All rewards that are numbers."""
        return [one for place in self.rewards for one in self.rewards[place] if isinstance(one, float)]

    def complete(self, engine: Engine, rewarder: Rewarder, *, batch_size: int) -> None:
        """Answers and scores what is not. Raises TrainingError where that cannot be had."""
        num_prompts = len(self.prompts)
        todo = [place for place in range(num_prompts) if None in self.rewards.get(place, [None])]
        for first in range(0, len(todo), batch_size):
            places = todo[first : first + batch_size]
            if waiting := [place for place in places if place not in self.answers]:
                self._answer(waiting, engine)
            if answered := [place for place in places if place in self.answers]:
                self._score(answered, rewarder)
                done, mean = num_prompts - len(todo) + first + len(places), statistics.fmean(self.scores)
                logger.info("%d of %d prompts, mean reward %.3f", done, num_prompts, mean)
        if not self.answers:
            raise TrainingError(f"no prompt was answered ({_reasons(self.unanswered.values())}); give others")

    def _answer(self, places: Sequence[int], engine: Engine) -> None:
        found = dict(zip(places, engine.sample([self.requests[i] for i in places], self.sampling), strict=True))
        failed = {place: some for place, some in found.items() if isinstance(some, Failure)}
        fresh = {
            place: tuple(Answer(one.text, one.finished) for one in some)
            for place, some in found.items()
            if not isinstance(some, Failure)
        }
        self.unanswered |= failed
        if fresh:
            self.files.keep_answers(fresh)
            self.answers |= fresh
            self.rewards |= {place: [None] * len(some) for place, some in fresh.items()}
        elif any(map(is_silence, failed.values())):
            raise TrainingError(f"the server gives no answer ({_reasons(failed.values())}); see to it and {_AGAIN}")

    def _score(self, places: Sequence[int], rewarder: Rewarder) -> None:
        jobs = [(place, i) for place in places for i, score in enumerate(self.rewards[place]) if score is None]
        asked = [(self.prompts[place], self.answers[place][i]) for place, i in jobs]
        found = rewarder.score([Answered(prompt.messages, one.text, prompt.row) for prompt, one in asked])
        for (place, i), reward in zip(jobs, found, strict=True):
            self.rewards[place][i] = reward.total
        self.files.keep_rewards({place: self.rewards[place] for place, _ in jobs})
        if not self.scores:
            why = _reasons(one.total for one in found if isinstance(one.total, Failure))
            raise TrainingError(f"no answer could be scored ({why}); mend the reward and {_AGAIN}")


def by_reason(failures: Iterable[Failure]) -> dict[str, int]:
    """How many there are of each reason, the most frequent first."""
    return dict(Counter(failure.reason for failure in failures).most_common())


def _reasons(failures: Iterable[Failure]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in by_reason(failures).items())
