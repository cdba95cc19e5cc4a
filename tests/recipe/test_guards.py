"""Guards are set by one word or by settings, in recipes and as flags, and written back as settings."""

import pytest

from luthier.errors import RecipeError
from luthier.recipe import SFT, dump_recipe, parse_recipe, settings_from_flags
from luthier.recipe.guards import Forgetting, Watch

GIVEN = {"data": "a", "eval_fraction": 0.1}
FLAGS = {"--data": "a", "--eval-fraction": "0.1"}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"--forgetting": ["a.txt"]}, Forgetting(text="a.txt")),
        ({"--forgetting": ["a.txt", "b.txt"]}, Forgetting(text=("a.txt", "b.txt"))),
        ({"--forgetting.text": ["a.txt", "b.txt"]}, Forgetting(text=("a.txt", "b.txt"))),
        ({"--forgetting": ["a.txt"], "--forgetting.stop": "0.3"}, Forgetting(text="a.txt", stop=0.3)),
        ({"--forgetting.questions": ["q.jsonl"]}, Forgetting(questions="q.jsonl")),
        ({"--forgetting": ["none"]}, None),
        ({}, None),
    ],
)
def test_a_flag_without_a_dot_is_what_a_bare_value_means(flags: dict[str, object], expected: Forgetting | None) -> None:
    assert settings_from_flags(SFT, FLAGS | flags).forgetting == expected


@pytest.mark.parametrize("value", ["a.txt", ["a.txt", "b.txt"], {"text": "a.txt", "stop": 0.3}])
def test_python_and_recipes_take_the_same_forms(value: object) -> None:
    made = SFT(**GIVEN, forgetting=value, watch="Who are you?")
    assert made.forgetting == Forgetting(**(value if isinstance(value, dict) else {"text": value}))
    assert made.watch == Watch(prompts=("Who are you?",))
    text = f"stages: [{{sft: {{data: a, eval_fraction: 0.1, forgetting: {value}, watch: ['Who are you?']}}}}]"
    recipe = parse_recipe(text)
    assert recipe.stages[0].settings.forgetting == made.forgetting
    assert parse_recipe(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"--forgetting": ["a"], "--forgetting.text": ["b"]}, r"--forgetting\.text: --forgetting a says another"),
        ({"--forgetting": ["none"], "--forgetting.stop": "1"}, r"--forgetting\.stop: there is none by --forgetting no"),
        ({"--forgetting": ["a"], "--forgetting.stop": "x"}, r"--forgetting\.stop: expected a number, got .x."),
        ({"--forgetting-data": "a"}, "--forgetting-data: unknown flag; did you mean .--forgetting"),
        ({"--watch.prompts": ["a"], "--watch.max-new-tokens": "0"}, r"--watch\.max-new-tokens: expected at least 1"),
    ],
)
def test_what_flags_say_wrongly_is_said_by_their_names(flags: dict[str, object], complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        settings_from_flags(SFT, FLAGS | flags)


@pytest.mark.parametrize("name", ["forgetting", "watch"])
def test_a_guard_needs_evaluations(name: str) -> None:
    with pytest.raises(RecipeError, match=f"^{name}: needs evaluations; give eval_data or eval_fraction"):
        SFT(data="a", **{name: "a"})


def test_a_factor_that_every_step_is_over_is_refused() -> None:
    with pytest.raises(RecipeError, match="max_grad_spike: expected more than 1"):
        SFT(data="a", max_grad_spike=1)
