"""Settings as flags: names, help, and the same settings as a recipe gives."""

import pytest

from luthier.errors import RecipeError
from luthier.recipe import ADAPTER_SETTINGS, SFT, STAGE_SETTINGS, LoRA, flags_of, parse_recipe, settings_from_flags
from luthier.recipe.policy import OnPolicy
from luthier.recipe.rewards import FunctionReward, NumericReward
from luthier.recipe.sampling import AnswerSampling
from luthier.recipe.settings import Settings
from luthier.recipe.training import Training

each_stage = pytest.mark.parametrize("settings", STAGE_SETTINGS.values())
each_rewarded = pytest.mark.parametrize(
    "settings", [AnswerSampling, *(kind for kind in STAGE_SETTINGS.values() if issubclass(kind, OnPolicy))]
)
FLAGS = {flag.name: flag for flag in flags_of(SFT)}


@each_stage
def test_every_flag_has_help_and_a_name_of_its_own(settings: type[Training]) -> None:
    flags = flags_of(settings)
    assert all(flag.help for flag in flags)
    assert len({flag.name for flag in flags}) == len({flag.path for flag in flags}) == len(flags)


@each_stage
def test_every_field_is_a_flag(settings: type[Training]) -> None:
    assert {flag.path[0] for flag in flags_of(settings)} == set(settings.model_fields)


def test_flags_are_named_by_dashes_and_dots() -> None:
    assert FLAGS["--batch-size"].path == ("batch_size",)
    assert FLAGS["--adapter.target-modules"].path == ("adapter", "target_modules")
    assert FLAGS["--packing"].negative == "--no-packing"
    assert FLAGS["--adapter.rs-scaling"].negative == "--no-adapter.rs-scaling"
    assert FLAGS["--batch-size"].negative is None


def test_flags_know_their_words_defaults_and_number() -> None:
    assert FLAGS["--adapter"].choices == (*ADAPTER_SETTINGS, "none")
    assert FLAGS["--report-to"].choices == ("mlflow", "tensorboard", "trackio", "wandb")
    assert FLAGS["--eval-every"].choices == ()
    assert FLAGS["--data"].required
    assert [name for name, flag in FLAGS.items() if flag.required] == ["--data"]
    assert (FLAGS["--adapter"].default, FLAGS["--adapter.r"].default, FLAGS["--learning-rate"].default) == (
        "lora",
        16,
        None,
    )
    several = {name for name, flag in FLAGS.items() if flag.multiple}
    assert several >= {"--adapter.target-modules", "--adapter.rank-pattern", "--adapter.layers-to-transform"}
    assert {name for name in several if not name.startswith("--adapter")} == {
        "--data",
        "--eval-data",
        "--columns",
        "--forgetting",
        "--forgetting.questions",
        "--forgetting.text",
        "--fp8.skip",
        "--freeze",
        "--parameter-groups",
        "--report-to",
        "--watch",
        "--watch.prompts",
    }


def test_flags_and_recipe_make_the_same_settings() -> None:
    text = """
output: runs/sft
stages:
  - sft:
      data: [qa.jsonl, more.jsonl]
      columns: {prompt: question}
      adapter: {type: lora, r: 8, target_modules: [q_proj]}
      learning_rate: 2e-5
      packing: no
      eval_fraction: 0.1
      eval_every: 50
"""
    flags = {
        "--data": ("qa.jsonl", "more.jsonl"),
        "--columns": ["prompt=question"],
        "--adapter.r": "8",
        "--adapter.target-modules": ["q_proj"],
        "--learning-rate": "2e-5",
        "--packing": False,
        "--eval-fraction": "0.1",
        "--eval-every": "50",
    }
    assert settings_from_flags(SFT, flags) == parse_recipe(text).stages[0].settings


def test_no_adapter_is_full_fine_tuning() -> None:
    assert settings_from_flags(SFT, {"--data": "a", "--adapter": "none"}).adapter is None


@pytest.mark.parametrize("flags", [{}, {"--adapter": "lora"}, {"--adapter.type": "lora"}])
def test_an_adapters_field_alone_selects_lora(flags: dict[str, str]) -> None:
    assert settings_from_flags(SFT, {"--data": "a", "--adapter.r": "8", **flags}).adapter == LoRA(r=8)


def test_flags_that_are_not_given_keep_the_defaults() -> None:
    assert settings_from_flags(SFT, {"--data": "a", "--seed": None, "--freeze": (), "--columns": []}) == SFT(data="a")


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"--lerning-rate": "1"}, '--lerning-rate: unknown flag; did you mean "--learning-rate"?'),
        ({"--adapter.rnk": "1"}, '--adapter.rnk: unknown flag; did you mean "--adapter.r"?'),
        ({"--lr": "1"}, '--lr: unknown flag; did you mean "--learning-rate"?'),
        ({"--lora-r": "1"}, '--lora-r: unknown flag; did you mean "--adapter.r"?'),
        ({"--batch-size": "x"}, '--batch-size: expected a whole number, got "x"'),
        ({"--adapter.r": "0"}, '--adapter.r: expected at least 1, got "0"'),
        ({"--adapter": "lroa"}, '--adapter: unknown type; did you mean "lora"?'),
        (
            {"--adapter": "none", "--adapter.r": "8"},
            "--adapter.r: there is none by --adapter none; leave one of the two out",
        ),
        (
            {"--adapter": "lora", "--adapter.type": "dora"},
            "--adapter.type: --adapter lora says another; leave one of the two out",
        ),
        ({"--columns": ["prompt"]}, '--columns: expected name=value, got "prompt"'),
        (
            {"--report-to": ["wandb", "wand"]},
            '--report-to: [1]: expected one of "mlflow", "tensorboard", "trackio", "wandb", got "wand"; '
            'did you mean "wandb"?',
        ),
        ({"--decay-ratio": "0.1"}, "--decay-ratio: the cosine schedule has none; drop it or choose schedule: wsd"),
    ],
)
def test_a_bad_flag_is_answered_by_its_name(flags: dict[str, object], complaint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        settings_from_flags(SFT, {"--data": "a", **flags})
    assert str(caught.value) == complaint


def test_all_bad_flags_are_said_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        settings_from_flags(SFT, {"--epochs": "0", "--seed": "x"})
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["--data", "--seed", "--epochs"]


@each_rewarded
@pytest.mark.parametrize(
    ("flags", "reward"),
    [
        ({"--reward": ("numeric",)}, NumericReward()),
        ({"--reward": ("numeric",), "--reward.column": "label"}, NumericReward(column="label")),
        ({"--reward.type": "numeric"}, NumericReward()),
        ({"--reward": ("a.py:score",)}, FunctionReward(function="a.py:score")),
        ({"--reward": ("a.py:score",), "--reward.weight": "2"}, FunctionReward(function="a.py:score", weight=2)),
        ({"--reward.function": "a.py:score"}, FunctionReward(function="a.py:score")),
        ({"--reward": ("numeric", "a.py:score")}, (NumericReward(), FunctionReward(function="a.py:score"))),
    ],
)
def test_a_reward_is_named_by_its_type_or_by_its_function(
    settings: type[Settings], flags: dict[str, object], reward: object
) -> None:
    assert dict(settings_from_flags(settings, {"--data": "a", **flags}))["reward"] == reward


@each_rewarded
def test_the_words_of_a_flag_that_takes_functions_are_no_closed_list(settings: type[Settings]) -> None:
    flags = {flag.name: flag for flag in flags_of(settings)}
    assert flags["--reward"].choices == ()
    assert flags["--reward"].multiple
    assert "numeric" in flags["--reward.type"].choices


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"--reward": ("numeric", "exat")}, '--reward: [1]: unknown type; did you mean "exact"?'),
        ({"--reward": ("a.py:not a name",)}, '--reward.function: expected a function in a file, such as "judge.py:'),
        (
            {"--reward": ("numeric", "exact"), "--reward.column": "label"},
            "--reward.column: --reward names several, and no flag can say of which this is; name one",
        ),
    ],
)
def test_a_bad_reward_is_answered_by_its_flag(flags: dict[str, object], complaint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        settings_from_flags(AnswerSampling, {"--data": "a", **flags})
    assert str(caught.value).startswith(complaint)
