"""What answers are worth: the parts that a recipe names, weighted and added, each kept for itself.

Answers are scored in batches: a reward model computes them together, servers and tests work on several at once. A part
that raises, loops, or gives no number fails for that answer alone, with a reason that can be counted; an answer with a
failed part has no total, and whoever learns from rewards leaves it out.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType, TracebackType
from typing import Self

from luthier.errors import RecipeError
from luthier.models.load import Model
from luthier.models.rewards import load_reward, rewards
from luthier.models.rewards_beside import RewardsBeside
from luthier.recipe.rewards import (
    AnyReward,
    CodeReward,
    FunctionReward,
    JsonReward,
    JudgeReward,
    LengthReward,
    MathReward,
    ModelReward,
    PythonReward,
    RegexReward,
)
from luthier.rollout.isolated import isolated_function, isolated_rule
from luthier.rollout.rules import length_rule, rule_of
from luthier.rollout.sandbox import scored_by_tests
from luthier.rollout.scoring import (
    Answered,
    Failure,
    Rewards,
    Rule,
    Score,
    ScoringFunction,
    finite,
    guarded,
    said,
    scored_by,
    scored_by_model,
)
from luthier.rollout.server_score import ServerScore

__all__ = ["Part", "Reward", "Rewarder", "count_failures", "reward_model", "rewarder_of"]

BatchScore = Callable[[Sequence[Answered]], list[Score]]


@dataclass(frozen=True, slots=True)
class Reward:
    """What one answer is worth. total: the weighted sum, or the first part's failure. parts: by name, unweighted."""

    total: Score
    parts: Mapping[str, Score]


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a reward. score: its number for each of some answers, in their order. close: ends what it holds."""

    name: str
    weight: float
    score: BatchScore
    close: Callable[[], None] = lambda: None


class Rewarder:
    """Scores answers by parts. What they hold ends with `close`, processes also when it is no longer used."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)

    def score(self, answered: Sequence[Answered]) -> list[Reward]:
        """The reward of each answer, in their order, whatever the parts do."""
        columns = {part.name: _scores(part, answered) for part in self.parts}
        found = [{name: column[place] for name, column in columns.items()} for place in range(len(answered))]
        return [Reward(self._total(scores), scores) for scores in found]

    def _total(self, scores: Mapping[str, Score]) -> Score:
        total = 0.0
        for part in self.parts:
            score = scores[part.name]
            if isinstance(score, Failure):
                return Failure(f"{part.name}: {score.reason}", score.detail)
            total += part.weight * score
        return finite(total)

    def close(self) -> None:
        """Ends the processes that parts run in, and takes adapters of reward models off the model."""
        for part in self.parts:
            part.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def count_failures(found: Iterable[Reward]) -> dict[str, int]:
    """How many parts failed, by `part: reason`, the most frequent first; an answer may have several."""
    reasons = Counter(
        f"{name}: {score.reason}"
        for reward in found
        for name, score in reward.parts.items()
        if isinstance(score, Failure)
    )
    return dict(reasons.most_common())


def reward_model(name: str, adapter: str | None = None) -> Rewards:
    """The rewards that the reward model of this name gives, or the adapter of one on the model of this name. Raises
    what `load_reward` raises.
    """
    return partial(rewards, load_reward(name, adapter=adapter))


def rewarder_of(
    reward: AnyReward | Sequence[AnyReward],
    *,
    functions: Mapping[str, ScoringFunction] = MappingProxyType({}),
    model: Model | None = None,
    load_rewards: Callable[[str, str | None], Rewards] = reward_model,
    environment: Mapping[str, str] = os.environ,
) -> Rewarder:
    """The rewarder by its settings, ready to score.

    functions: the calling program's, by the digests of their code. model: whose answers they are, which counts lengths
    in tokens and takes reward models' adapters that name no model.
    load_rewards: what the names of a reward model and of an adapter for it stand for.
    Raises RecipeError for a function, a key, a file or a library that is not there, or two parts of one name, and what
    the loader and `RewardsBeside` raise.
    """
    settings = [reward] if isinstance(reward, AnyReward) else reward
    parts = [_part(one, functions, model, load_rewards, environment) for one in settings]
    twice = [name for name, count in Counter(part.name for part in parts).items() if count > 1]
    if twice:
        raise RecipeError(f'reward: two parts are called "{twice[0]}"; give one of them another name')
    return Rewarder(parts)


def _part(
    settings: AnyReward,
    functions: Mapping[str, ScoringFunction],
    model: Model | None,
    load_rewards: Callable[[str, str | None], Rewards],
    environment: Mapping[str, str],
) -> Part:
    part = partial(Part, settings.called, settings.weight)
    match settings:
        case FunctionReward():
            limit = int(settings.memory_gb * 2**30)
            process = isolated_function(settings.function, timeout_seconds=settings.timeout_seconds, memory_bytes=limit)
            return part(process.score, process.close)
        case PythonReward():
            if settings.digest not in functions:
                raise RecipeError(
                    f"reward: {settings.called} is a function of the program that began this run; run that program, or "
                    "name a function in a file"
                )
            return part(partial(scored_by, functions[settings.digest]))
        case JsonReward() | MathReward() | RegexReward():  # some text could keep them busy for ever
            process = isolated_rule(settings, timeout_seconds=settings.timeout_seconds)
            return part(process.score, process.close)
        case LengthReward():
            return part(partial(_by_rule, length_rule(settings, None if model is None else partial(_length, model))))
        case ModelReward(model=str(name)):
            return part(partial(scored_by_model, load_rewards(name, settings.adapter)))
        case ModelReward(adapter=str(adapter)):
            if model is None:
                raise RecipeError("reward.model: is required, for no model is trained here; name one")
            beside = RewardsBeside(model, adapter)
            return part(partial(scored_by_model, beside), beside.close)
        case CodeReward():
            return part(partial(scored_by_tests, settings))
        case JudgeReward():
            return part(ServerScore(settings, environment).score)
    return part(partial(_by_rule, rule_of(settings)))


def _length(model: Model, text: str) -> int:
    return len(model.tokenizer.encode(text, add_special_tokens=False))


def _by_rule(rule: Rule, answered: Sequence[Answered]) -> list[Score]:
    return [guarded(rule, one) for one in answered]


def _scores(part: Part, answered: Sequence[Answered]) -> list[Score]:
    """A part that fails as a whole fails for each answer, and the others still score."""
    try:
        return part.score(answered)
    except Exception as error:
        return [Failure(f"raised {type(error).__name__}", said(error))] * len(answered)
