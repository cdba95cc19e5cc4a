"""An optimizer is a word or fields, brings the rate and schedule that fit it, and is refused where it cannot be."""

import pytest
from pydantic import ValidationError

from luthier.errors import RecipeError
from luthier.recipe import SFT, dump_recipe, parse_recipe, settings_from_flags
from luthier.recipe.optimizers import Adafactor, Adam8bit, AdamW, Lion, Muon, ParameterGroup, ScheduleFree


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("adamw", AdamW()),
        ("{beta2: 0.95}", AdamW(beta2=0.95)),
        ("{type: adam8bit, stable_embedding: false}", Adam8bit(stable_embedding=False)),
        ("{type: adafactor, scale_parameter: true}", Adafactor(scale_parameter=True)),
        ("lion", Lion()),
        ("{type: muon, momentum: 0.9}", Muon(momentum=0.9)),
        ("schedule_free", ScheduleFree()),
    ],
)
def test_an_optimizer_can_be_a_word_or_fields(written: str, meant: object) -> None:
    recipe = parse_recipe(f"stages: [{{sft: {{data: a, optimizer: {written}}}}}]")
    assert recipe.stages[0].settings.optimizer == meant
    assert parse_recipe(dump_recipe(recipe)) == recipe


def test_flags_say_the_optimizer_by_its_fields() -> None:
    flags = {"--data": "a", "--optimizer": "muon", "--optimizer.momentum": "0.9"}
    assert settings_from_flags(SFT, flags).optimizer == Muon(momentum=0.9)
    with pytest.raises(RecipeError, match=r"--optimizer.momentum: unknown field; known are type, beta1, beta2"):
        settings_from_flags(SFT, flags | {"--optimizer": "lion"})


def test_lions_usual_rate_is_a_fifth_of_the_others() -> None:
    for adapter in ("lora", "ia3", None):
        usual, of_muon, of_lion = (
            SFT(data="a", adapter=adapter, optimizer=name).learning_rate for name in ("adamw", "muon", "lion")
        )
        assert usual == of_muon == pytest.approx(5 * of_lion)
    assert SFT(data="a", optimizer="lion", learning_rate=1e-3).learning_rate == 1e-3


def test_schedule_free_has_a_constant_rate_after_warming_up() -> None:
    assert [SFT(data="a", optimizer=name).schedule for name in ("adamw", "schedule_free")] == ["cosine", "constant"]


def test_a_number_stands_for_the_ratio_of_a_group() -> None:
    named = {"*.lora_B": 4, "*norm*": {"weight_decay": 0}}
    groups = {"*.lora_B": ParameterGroup(rate_ratio=4), "*norm*": ParameterGroup(weight_decay=0)}
    assert SFT(data="a", parameter_groups=named).parameter_groups == groups
    flags = {"--data": "a", "--parameter-groups": ["*.lora_B=4", "*.lora_A=0.5"]}
    assert [group.rate_ratio for group in settings_from_flags(SFT, flags).parameter_groups.values()] == [4, 0.5]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": "moun"}, 'optimizer: unknown type; did you mean "muon"'),
        ({"optimizer": "paged_adamw_8bit"}, 'unknown type "paged_adamw_8bit"; it is adam8bit'),
        ({"optimizer": {"type": "adamw", "stable_embedding": True}}, "optimizer.stable_embedding: unknown field"),
        ({"optimizer": {"type": "muon", "momentum": 1}}, "optimizer.momentum: expected less than 1"),
        ({"optimizer": {"type": "schedule_free", "beta1": 0}}, "optimizer.beta1: expected more than 0"),
        ({"optimizer": "schedule_free", "schedule": "cosine"}, "schedule: schedule_free averages in place of one"),
        ({"optimizer": "schedule_free", "adapter": "adalora"}, "bring back the ranks that adalora takes out"),
        ({"adam_beta1": 0.8}, "adam_beta1: unknown field"),
        ({"layer_decay": 0.0}, "more than 0"),
        ({"layer_decay": 1.5}, "layer_decay: expected"),
        ({"parameter_groups": {"*": {}}}, r"parameter_groups.\*: says nothing; give rate_ratio"),
        ({"parameter_groups": {"*": 0}}, r"parameter_groups.\*.rate_ratio: expected more than 0"),
        ({"parameter_groups": {"*": "x"}}, r"parameter_groups.\*.rate_ratio: expected a number"),
        ({"offload_optimizer": "disk"}, "offload_optimizer: an adapter's moments are small"),
    ],
)
def test_what_would_have_no_effect_or_no_sense_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SFT.model_validate({"data": "rows.jsonl"} | given)
