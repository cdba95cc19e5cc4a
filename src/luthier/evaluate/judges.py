"""The judge that a recipe asks for."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import assert_never

from luthier.evaluate.model_judge import ModelJudge
from luthier.evaluate.server_judge import ServerJudge
from luthier.evaluate.verdicts import Judge, ScalarJudge
from luthier.models.load import Model, load
from luthier.recipe.judges import EndpointJudge, JudgeSettings, LocalJudge, RewardJudge, RuleJudge
from luthier.rollout.asking import endpoint_of
from luthier.rollout.isolated import isolated_function
from luthier.rollout.rewards import reward_model
from luthier.rollout.scoring import Rewards, scored_by_model

__all__ = ["judge_of"]


def judge_of(
    settings: JudgeSettings,
    *,
    load_rewards: Callable[[str], Rewards] = reward_model,
    load_model: Callable[[str], Model] = load,
    environment: Mapping[str, str] = os.environ,
) -> Judge:
    """The judge by its settings, ready to be asked.

    load_rewards, load_model: what the name of a reward model, or of a judging model, stands for.
    Raises RecipeError for a function or a key that is not there, and what the loaders raise.
    """
    match settings:
        case RuleJudge():
            return ScalarJudge(isolated_function(settings.function, timeout_seconds=settings.timeout_seconds).score)
        case RewardJudge():
            return ScalarJudge(partial(scored_by_model, load_rewards(settings.model)))
        case LocalJudge():
            return ModelJudge(load_model(settings.model), settings.criteria)
        case EndpointJudge():
            return _server_judge(settings, environment)
    assert_never(settings)


def _server_judge(settings: EndpointJudge, environment: Mapping[str, str]) -> ServerJudge:
    endpoint = endpoint_of(settings, environment)
    return ServerJudge(endpoint, settings.criteria, max_new_tokens=settings.max_new_tokens, parallel=settings.parallel)
