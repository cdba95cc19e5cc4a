"""Laws: what is written back reads the same, and a recipe, flags and Python make the same settings."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.recipe import (
    ADAPTER_SETTINGS,
    SFT,
    LoRA,
    Pretrain,
    Recipe,
    Stage,
    dump_recipe,
    flags_of,
    parse_recipe,
    settings_from_flags,
)
from luthier.recipe.adapters import AdapterFusion
from luthier.recipe.optimizers import Adafactor, AdamW, Lion, Muon, ParameterGroup
from luthier.recipe.training import Training

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12) | st.sampled_from(
    ["no", "2e-5", "1", "~", "true", "none", "a: b", "- a", "# a", "*a", "&a", "1:30", "2024-01-01", "=", "<<", " a "]
)
# text that stands where "none" would mean nothing
paths = words.filter(lambda word: word != "none")
names = st.lists(paths, min_size=2, max_size=3).map(tuple)
counts = st.integers(1, 10**6)
rates = st.floats(1e-12, 1e12)
loras = st.builds(
    LoRA,
    r=counts,
    dropout=st.floats(0, 0.99),
    target_modules=st.just("all-linear") | names,
    rs_scaling=st.booleans(),
    alpha=rates,
    init=st.sampled_from(["kaiming", "gaussian", "pissa"]),
    rank_pattern=st.dictionaries(st.sampled_from(["q_proj", "mlp.up_proj"]), counts, max_size=2),
    layers_to_transform=st.none() | st.lists(st.integers(0, 99), min_size=1, max_size=3).map(tuple),
)
plain = [kind() for word, kind in ADAPTER_SETTINGS.items() if word != "fusion"]  # which cannot be without members
fusions = st.builds(AdapterFusion, adapters=names)
adapters = st.none() | loras | fusions | st.sampled_from(plain)
shared: dict[str, Any] = {
    "data": paths | names,
    "eval_data": st.none() | paths | names,
    # a flag's last "=" separates, so only a recipe can name a column that holds one
    "columns": st.dictionaries(words, words.filter(lambda word: "=" not in word), max_size=2),
    "seed": st.integers(0, 2**32 - 1),
    "adapter": adapters,
    "epochs": counts,
    "max_steps": st.none() | counts,
    "packing": st.booleans(),
    "optimizer": st.sampled_from([AdamW(), Adafactor(), Lion()]) | st.builds(Muon, epsilon=rates),
    "parameter_groups": st.dictionaries(words, st.builds(ParameterGroup, rate_ratio=rates), max_size=2),
    "learning_rate": rates,
    "schedule": st.sampled_from(["constant", "wsd"]),
    "max_grad_norm": st.none() | rates,
    "gradient_checkpointing": st.booleans() | st.integers(0, 9) | st.just("selective"),
    "save_every": st.none() | st.just("epoch") | counts,
    "report_to": st.sampled_from([(), ("tensorboard",), ("wandb", "mlflow")]),
    "on_error": st.sampled_from(["skip", "stop"]),
}
sfts = st.builds(SFT, **shared, train_on=st.sampled_from(["all", "last"]), chat_template=st.none() | paths)
pretrains = st.builds(Pretrain, **shared, mix=st.dictionaries(words, st.floats(0.01, 0.4), max_size=2))
stages = st.builds(Stage, st.just("sft"), sfts) | st.builds(Stage, st.just("pretrain"), pretrains)
recipes = st.builds(
    Recipe,
    model=words,
    output=words,
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(["bf16", "fp16", "fp32"]),
    stages=st.lists(stages, min_size=1, max_size=3).map(tuple),
)
unhurried = settings(deadline=None)
NOT_OF_THIS_TYPE = object()  # a flag that another type of adapter has


@unhurried
@given(recipes)
def test_a_recipe_written_back_is_the_recipe(recipe: Recipe) -> None:
    assert parse_recipe(dump_recipe(recipe)) == recipe


@unhurried
@given(recipes)
def test_a_written_recipe_leaves_nothing_to_defaults(recipe: Recipe) -> None:
    for stage in parse_recipe(dump_recipe(recipe)).stages:
        assert stage.settings.model_fields_set == set(type(stage.settings).model_fields)


@unhurried
@given(sfts | pretrains)
def test_flags_say_all_that_settings_can_say(said: Training) -> None:
    assert settings_from_flags(type(said), as_flags(said)) == said


def as_flags(said: Training) -> dict[str, object]:
    """The settings as somebody would type them."""
    typed: dict[str, object] = {}
    for flag in flags_of(type(said)):
        value: Any = said
        for step in flag.path:
            value = getattr(value, step, NOT_OF_THIS_TYPE)
        if value is NOT_OF_THIS_TYPE:
            continue
        if flag.path in (("adapter",), ("optimizer",)) and value is not None:
            typed[flag.name] = value.type
        elif flag.path[0] != "adapter" or said.adapter is not None or flag.path == ("adapter",):
            typed[flag.name] = as_typed(value)
    return typed


def as_typed(value: object) -> object:
    if isinstance(value, dict):
        return [f"{name}={getattr(entry, 'rate_ratio', entry)}" for name, entry in value.items()]
    if isinstance(value, tuple | list):
        return [str(entry) for entry in value]
    return "none" if value is None else value if isinstance(value, bool) else str(value)
