"""Settings of sampling examples: what would have no effect, or is not said, is refused by its name."""

from typing import Any, get_args

import pytest

from luthier.errors import RecipeError
from luthier.recipe import settings_from
from luthier.recipe.rewards import NumericReward
from luthier.recipe.rollout_servers import ServerKind
from luthier.recipe.sampling import AnswerSampling

SERVER: dict[str, Any] = {"url": "http://localhost:8000/v1", "model": "m"}


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"keep": "all"}, "min_reward: keep: all keeps what reaches it; give one, or choose best"),
        ({"kep": "all"}, 'kep: unknown field; did you mean "keep"?'),
        ({"keep": "worst"}, 'keep: expected one of "all", "best", got "worst"'),
        ({"num_answers": 0}, "num_answers: expected at least 1, got 0"),
        ({"temperature": 0}, "temperature: expected more than 0.0, got 0"),
        (
            {"server": {**SERVER, "kind": "vllm", "allow_stale": True}},
            "server.allow_stale: has no effect where nothing is sent; leave it out",
        ),
    ],
)
def test_what_is_wrong_is_said_by_the_field(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        settings_from(AnswerSampling, {"data": "a", "reward": "exact", **given})
    assert str(caught.value) == complaint


def test_a_reward_is_required() -> None:
    assert settings_from(AnswerSampling, {"data": "a", "reward": "numeric"}).reward == NumericReward()
    with pytest.raises(RecipeError, match="reward: is required"):
        settings_from(AnswerSampling, {"data": "a"})


@pytest.mark.parametrize("kind", get_args(ServerKind))
def test_no_kind_of_server_is_sent_anything(kind: str) -> None:
    settings = settings_from(AnswerSampling, {"data": "a", "reward": "exact", "server": {**SERVER, "kind": kind}})
    assert settings.server is not None
    assert (settings.server.kind, settings.server.push) == (kind, None)
