"""Loss scaling is fp16's, by default wherever that was said; eight bits are asked for. Both are refused elsewhere."""

import pytest

from luthier.errors import RecipeError
from luthier.recipe import SFT, Recipe, Stage, dump_recipe, parse_recipe, settings_from_flags
from luthier.recipe.precision import CurrentFP8, DelayedFP8, DynamicScaling, StaticScaling


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("dynamic", DynamicScaling()),
        ("{initial: 1024}", DynamicScaling(initial=1024)),
        ("static", StaticScaling()),
        ("{type: static, scale: 8}", StaticScaling(scale=8)),
        ("none", None),
    ],
)
def test_loss_scaling_can_be_a_word_or_fields(written: str, meant: object) -> None:
    text = f"dtype: fp16\nstages: [{{sft: {{data: a, loss_scaling: {written}}}}}]"
    recipe = parse_recipe(text)
    assert recipe.stages[0].settings.loss_scaling == meant
    assert parse_recipe(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize(
    "text",
    [
        "{dtype: fp16, stages: [{sft: {data: a}}, {dpo: {data: b}}]}",
        "stages: [{sft: {data: a, dtype: fp16}}]",
        "{dtype: fp16, stages: [{grpo: {data: a, reward: numeric}}]}",
    ],
)
def test_fp16_scales_the_loss_wherever_it_was_said(text: str) -> None:
    assert {stage.settings.loss_scaling for stage in parse_recipe(text).stages} == {DynamicScaling()}


def test_a_stage_made_in_python_takes_the_recipes_fp16_with_its_scaling() -> None:
    settings = Recipe(dtype="fp16", stages=(Stage("sft", SFT(data="a", epochs=7)),)).stages[0].settings
    assert (settings.dtype, settings.loss_scaling, settings.epochs) == ("fp16", DynamicScaling(), 7)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_types_with_the_range_of_gradients_have_no_loss_scaling(dtype: str) -> None:
    assert SFT(data="a", dtype=dtype).loss_scaling is None
    with pytest.raises(
        RecipeError, match=f"loss_scaling: {dtype} has the range of gradients; drop it or set dtype: fp16"
    ):
        SFT(data="a", dtype=dtype, loss_scaling="dynamic")


def test_an_initial_scale_lies_between_floor_and_ceiling() -> None:
    assert DynamicScaling(initial=8, floor=8, ceiling=8).initial == 8
    for wrong in ({"initial": 0.5}, {"initial": 9, "ceiling": 8}):
        with pytest.raises(RecipeError, match=r"initial: .* is not between the floor"):
            DynamicScaling(**wrong)


def test_flags_say_the_scaling_by_its_fields() -> None:
    given = {"--data": "a", "--dtype": "fp16", "--loss-scaling.interval": "100"}
    assert settings_from_flags(SFT, given).loss_scaling == DynamicScaling(interval=100)
    given = {"--data": "a", "--dtype": "fp16", "--loss-scaling": "static", "--loss-scaling.scale": "64"}
    assert settings_from_flags(SFT, given).loss_scaling == StaticScaling(scale=64)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("delayed", DelayedFP8()),
        ("{window: 32}", DelayedFP8(window=32)),
        ("{type: delayed, margin: 1, skip: '*.down_proj'}", DelayedFP8(margin=1, skip=("*.down_proj",))),
        ("current", CurrentFP8()),
        ("none", None),
        ("off", None),
    ],
)
def test_eight_bits_can_be_a_word_or_fields(written: str, meant: object) -> None:
    recipe = parse_recipe(f"stages: [{{sft: {{data: a, fp8: {written}}}}}]")
    assert recipe.stages[0].settings.fp8 == meant
    assert parse_recipe(dump_recipe(recipe)) == recipe


def test_eight_bits_are_off_by_default_and_said_by_flags() -> None:
    assert SFT(data="a").fp8 is None
    given = {"--data": "a", "--fp8": "current", "--fp8.margin": "2"}
    assert settings_from_flags(SFT, given).fp8 == CurrentFP8(margin=2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fp8": "delayed", "quantize_base": "nf4"}, "fp8: the frozen weights are nf4 codes already, .*; drop fp8 or"),
        ({"fp8": "delayed", "dtype": "fp16"}, "fp8: scales each tensor by itself, and fp16 .*; set dtype: bf16 or"),
        ({"fp8": {"type": "current", "window": 4}}, "window: unknown"),
        ({"fp8": {"window": 0}}, "window: expected"),
        ({"fp8": {"margin": -1}}, "margin: expected"),
        ({"fp8": "delay"}, 'fp8: unknown type; did you mean "delayed"'),
    ],
)
def test_eight_bits_that_make_no_sense_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        SFT(data="a", **given)
