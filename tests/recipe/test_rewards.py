"""Which rewards a recipe can ask for, in which words, and what is refused before any model is loaded."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import RecipeError
from luthier.recipe.flags import flags_of, settings_from_flags
from luthier.recipe.rewards import (
    REWARD_SETTINGS,
    AnyReward,
    CodeReward,
    ExactReward,
    FunctionReward,
    JsonReward,
    JudgeReward,
    LengthReward,
    MathReward,
    ModelReward,
    NumericReward,
    RegexReward,
    RewardSettings,
    TagsReward,
    parts_of,
)
from luthier.recipe.settings import Settings, settings_from


class Stage(Settings):
    """A stage with a reward."""

    reward: RewardSettings
    """What an answer is worth."""


URL = "http://localhost:8000/v1"

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda text: text != "none")
shared: dict[str, Any] = {"weight": st.floats(-9, 9), "name": st.none() | texts}
kinds = st.one_of(
    st.builds(ExactReward, **shared, column=texts, tag=st.none() | st.just("answer"), ignore_case=st.booleans()),
    st.builds(NumericReward, **shared, where=st.sampled_from(["any", "boxed", "last"]), tolerance=st.floats(0, 9)),
    st.builds(MathReward, **shared, column=texts, timeout_seconds=st.floats(0.1, 9)),
    st.builds(LengthReward, **shared, maximum=st.integers(1, 99), unit=st.sampled_from(["characters", "tokens"])),
    st.builds(JsonReward, **shared, schema_file=st.none() | texts),
    st.builds(JsonReward, **shared, json_schema=st.just({"type": "object"})),
    st.builds(RegexReward, **shared, pattern=st.sampled_from(["a+", r"\d"]), match=st.sampled_from(["full", "start"])),
    st.builds(TagsReward, **shared, tags=st.sampled_from([("answer",), ("a", "b", "c")])),
    st.builds(ModelReward, **shared, model=texts),
    st.builds(FunctionReward, **shared, function=st.just("a b.py:f"), memory_gb=st.floats(0.1, 9)),
    st.builds(CodeReward, **shared, entry_point=st.none() | texts, score=st.sampled_from(["all", "share"])),
    st.builds(JudgeReward, **shared, url=st.just(URL), model=texts, scale=st.integers(1, 99)),
)
composites = st.lists(kinds, min_size=1, max_size=4, unique_by=lambda part: part.called).map(tuple)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("exact", ExactReward()),
        ("rewards.py:score", FunctionReward(function="rewards.py:score")),
        ({"type": "rewards.py:score", "weight": "2"}, FunctionReward(function="rewards.py:score", weight=2)),
        ({"function": "rewards.py:score"}, FunctionReward(function="rewards.py:score")),
        ({"type": "math", "column": "solution"}, MathReward(column="solution")),
        ({"type": "tags", "tags": "answer"}, TagsReward(tags=("answer",))),
        ({"type": "json", "json_schema": {"type": "array"}}, JsonReward(json_schema={"type": "array"})),
        ([{"type": "math", "weight": 1.0}, "tags"], (MathReward(), TagsReward())),
        (["exact", {"type": "exact", "name": "loose"}], (ExactReward(), ExactReward(name="loose"))),
        (ModelReward(model="m"), ModelReward(model="m")),
    ],
)
def test_a_reward_is_a_word_a_function_settings_or_a_list(written: object, meant: object) -> None:
    assert settings_from(Stage, {"reward": written}).reward == meant


@given(kinds | composites)
def test_a_reward_written_back_is_the_reward(reward: Any) -> None:
    stage = Stage(reward=reward)
    assert settings_from(Stage, json.loads(json.dumps(stage.model_dump(mode="json")))) == stage
    assert settings_from(Stage, stage.model_dump()) == stage


@given(kinds)
def test_flags_say_all_that_one_reward_can_say(reward: AnyReward) -> None:
    typed: dict[str, object] = {"--reward": reward.type}
    for flag in flags_of(Stage):
        if len(flag.path) == 2 and flag.path[1] != "type" and flag.path[1] in type(reward).model_fields:
            typed[flag.name] = as_typed(getattr(reward, flag.path[1]))
    assert settings_from_flags(Stage, typed).reward == reward


def as_typed(value: object) -> object:
    if isinstance(value, dict):
        return [f"{name}={entry}" for name, entry in value.items()]
    if isinstance(value, tuple):
        return [str(entry) for entry in value]
    return "none" if value is None else value if isinstance(value, bool) else str(value)


def test_flags_name_functions_and_several_rewards() -> None:
    named = FunctionReward(function="r.py:f", weight=2)
    for given_flags in ({"--reward": "r.py:f"}, {"--reward.function": "r.py:f"}):
        assert settings_from_flags(Stage, {**given_flags, "--reward.weight": "2"}).reward == named
    assert settings_from_flags(Stage, {"--reward": ("exact", "tags")}).reward == (ExactReward(), TagsReward())


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ("tagz", r'^reward: unknown type; did you mean "tags"\?$'),
        (["exact", "tagz"], r'^reward\[1\]: unknown type; did you mean "tags"\?$'),
        ({"weight": 1}, r"^reward\.type: is required; it is one of exact, numeric, "),
        ([], r"^reward: is an empty list; name at least one reward$"),
        (7, r"^reward: expected a reward's type, a function in a file, settings, or a list of these$"),
        (["exact", "exact"], r'^reward: two parts are called "exact"; give one of them another name$'),
        ("score.py", r"^reward: unknown type; known are "),
        ({"type": "function", "function": "score"}, r'^reward\.function: expected a function in a file.*"score"$'),
        ({"type": "exact", "weight": "nan"}, r"^reward\.weight: expected a finite number"),
        ({"type": "length"}, r"^reward\.aim: give either aim or maximum$"),
        ({"type": "length", "aim": 1, "maximum": 2}, r"^reward\.aim: give either aim or maximum$"),
        (
            {"type": "json", "json_schema": {"type": "array"}, "schema_file": "f"},
            r"^reward\.schema_file: json_schema says",
        ),
        ({"type": "regex", "pattern": "("}, r'^reward\.pattern: expected a regular expression, got "\("'),
        ({"type": "tags", "tags": ["<a>"]}, r'^reward\.tags\[0\]: expected the bare name of a tag.*"<a>"$'),
        ({"type": "tags", "tags": ["a", "a"]}, r"^reward\.tags: expected each tag once$"),
        ({"type": "tags", "tags": []}, r"^reward\.tags: expected at least one entry"),
        ({"type": "math", "colunm": "x"}, r'^reward\.colunm: unknown field; did you mean "column"\?$'),
        ({"type": "function", "function": "a.py:f", "timeout_seconds": 0}, r"expected more than 0"),
    ],
)
def test_a_reward_that_makes_no_sense_is_said_at_its_field(written: object, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        settings_from(Stage, {"reward": written})


def test_every_problem_of_a_list_is_said_at_its_place() -> None:
    broken = [{"type": "length"}, "exact", {"type": "numeric", "where": "x"}]
    with pytest.raises(RecipeError) as caught:
        settings_from(Stage, {"reward": broken})
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "reward[0].aim",
        "reward[2].where",
    ]


def test_a_key_in_a_reward_is_refused_and_not_shown() -> None:
    judge = {"type": "judge", "url": URL, "model": "m", "api_key_env": "sk-123"}
    with pytest.raises(RecipeError, match="environment variable") as caught:
        settings_from(Stage, {"reward": [judge]})
    assert "123" not in str(caught.value)


def test_the_schema_admits_words_and_places_of_functions() -> None:
    forms = Stage.model_json_schema()["properties"]["reward"]["anyOf"]
    entries = next(form["items"]["anyOf"] for form in forms if form.get("type") == "array")
    for admitted in (entries, next(form["anyOf"] for form in forms if "anyOf" in form)):
        assert {"enum": list(REWARD_SETTINGS)} in admitted
        assert {"type": "string", "pattern": r"\.py:"} in admitted
        assert {"$ref": "#/$defs/MathReward"} in admitted


def test_rewards_are_known_by_their_type_and_called_by_it() -> None:
    assert all(kind.model_construct().type == name for name, kind in REWARD_SETTINGS.items())
    assert (ExactReward().called, ExactReward(name="right").called) == ("exact", "right")
    assert parts_of(ExactReward()) == parts_of((ExactReward(),)) == (ExactReward(),)
