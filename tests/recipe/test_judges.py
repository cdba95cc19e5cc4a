"""Which judges a recipe can ask for, and that no secret finds its way into one."""

import pytest

from luthier.errors import RecipeError
from luthier.recipe.judges import JUDGE_SETTINGS, EndpointJudge, JudgeSettings, LocalJudge, RewardJudge, RuleJudge
from luthier.recipe.settings import Settings, settings_from


class Stage(Settings):
    """A stage with a judge."""

    judge: JudgeSettings
    """Who judges."""


URL = "http://localhost:8000/v1"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ({"type": "rule", "function": "judge.py:prefer"}, RuleJudge(function="judge.py:prefer")),
        ({"type": "reward", "model": "runs/reward/model"}, RewardJudge(model="runs/reward/model")),
        ({"type": "local", "model": "m"}, LocalJudge(model="m")),
        ({"type": "local", "model": "m", "criteria": "Be kind."}, LocalJudge(model="m", criteria="Be kind.")),
        (
            {"type": "endpoint", "url": URL + "/", "model": "m", "api_key_env": "none", "timeout_seconds": "9"},
            EndpointJudge(url=URL, model="m", timeout_seconds=9),
        ),
        (RewardJudge(model="m"), RewardJudge(model="m")),
    ],
)
def test_a_judge_is_told_by_its_type(written: object, meant: Settings) -> None:
    stage = settings_from(Stage, {"judge": written})
    assert stage.judge == meant
    assert settings_from(Stage, stage.model_dump()) == stage


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ({"type": "rules"}, r'^judge\.type: unknown type; did you mean "rule"\?$'),
        ("rule", r"^judge\.function: is required; add it$"),
        ({"model": "m"}, r"^judge\.type: is required; it is one of rule, reward, local, endpoint$"),
        ({"type": 7}, r"^judge\.type: unknown type; known are rule, reward, local, endpoint$"),
        ({"type": "rule", "function": "judge.py"}, r'^judge\.function: expected a function in a file.*"judge\.py"$'),
        ({"type": "endpoint", "url": "localhost:8000", "model": "m"}, r"^judge\.url: expected an address such as"),
        ({"type": "endpoint", "url": "file:///etc/passwd", "model": "m"}, r"^judge\.url: expected an address such as"),
        ({"type": "endpoint", "url": URL, "model": "m", "api_key": "k"}, r'did you mean "api_key_env"\?$'),
        ({"type": "endpoint", "url": URL, "model": "m", "timeout_seconds": 0}, r"expected more than 0.0, got 0$"),
    ],
)
def test_a_judge_that_makes_no_sense_is_said_at_its_field(written: object, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        settings_from(Stage, {"judge": written})


@pytest.mark.parametrize(
    "field",
    [
        {"api_key_env": "sk-abc123"},
        {"api_key_env": "hf_abcABC123"},
        {"url": "https://me:abc123@host/v1"},
        {"url": "https://host/v1?key=abc123"},
        {"url": "https://host/v1#abc123"},
    ],
)
def test_a_key_in_a_recipe_is_refused_and_not_shown(field: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match="environment variable") as caught:
        settings_from(Stage, {"judge": {"type": "endpoint", "url": URL, "model": "m"} | field})
    assert "123" not in str(caught.value)


def test_judges_are_known_by_their_type() -> None:
    assert all(kind.model_construct().type == name for name, kind in JUDGE_SETTINGS.items())  # type: ignore[attr-defined]
