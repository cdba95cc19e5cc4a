"""What a recipe means for its stages, and what may be written in YAML."""

from pathlib import Path

import pytest

from luthier.errors import RecipeError
from luthier.recipe import SFT, Pretrain, Recipe, Stage, dump_recipe, load_recipe, parse_recipe, recipe_of

TEXT = """
model: mine
output: runs/pharma
seed: 7
dtype: fp32
stages:
  - pretrain: {adapter: {type: lora, r: 8}, data: docs, mix: {general.txt: 0.3}, learning_rate: 2.0e-5, seed: 8}
  - sft: {data: qa.jsonl, on_error: skip}
"""


def test_stages_have_the_recipes_word_for_what_they_do_not_say() -> None:
    first, second = parse_recipe(TEXT).stages
    assert (first.word, first.settings.model, first.settings.output) == ("pretrain", "mine", "runs/pharma")
    assert (first.settings.seed, second.settings.seed) == (8, 7)
    assert (first.settings.dtype, second.settings.dtype) == ("fp32", "fp32")
    assert (first.settings.on_error, second.settings.on_error) == ("stop", "skip")


def test_a_recipe_made_in_python_is_the_recipe_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(TEXT)
    pretrain = Pretrain(data="docs", adapter={"r": 8}, mix={"general.txt": 0.3}, learning_rate=2e-5, seed=8)  # type: ignore[arg-type]
    stages = (Stage("pretrain", pretrain), Stage("sft", SFT(data="qa.jsonl", on_error="skip")))
    made = Recipe(model="mine", output="runs/pharma", seed=7, dtype="fp32", stages=stages)
    assert load_recipe(tmp_path / "recipe.yaml") == made


def test_a_command_is_a_recipe_of_one_stage() -> None:
    settings = SFT(data="qa.jsonl", model="mine", seed=3, dtype="fp32")
    recipe = recipe_of("sft", settings)
    assert (recipe.model, recipe.output, recipe.seed, recipe.dtype) == ("mine", "runs/sft", 3, "fp32")
    assert [(stage.word, stage.settings) for stage in recipe.stages] == [("sft", settings)]


def test_a_stage_made_in_python_cannot_have_a_model_of_its_own() -> None:
    with pytest.raises(RecipeError, match=r"stages\[0\]\.sft\.model: belongs to the whole recipe"):
        Recipe(model="mine", stages=(Stage("sft", SFT(data="a", model="other")),))


def test_a_stage_has_the_settings_of_its_word() -> None:
    with pytest.raises(RecipeError, match=r'stages\[0\]: "sft" is no stage that takes Pretrain settings'):
        Recipe(stages=(Stage("sft", Pretrain(data="a")),))


def test_a_written_recipe_can_be_read_by_people() -> None:
    lines = dump_recipe(parse_recipe(TEXT)).splitlines()
    assert lines[:3] == ["model: mine", "output: runs/pharma", "seed: 7"]
    assert "    learning_rate: 2.0e-05" in lines
    assert "    on_error: skip" in lines


@pytest.mark.parametrize("written", ["2e-5", "2E-5", "2.0e-5", "0.00002", ".00002", "+2e-05", "'2e-5'"])
def test_a_number_may_be_written_in_any_way(written: str) -> None:
    assert sft(f"learning_rate: {written}").learning_rate == 2e-5


@pytest.mark.parametrize("written", ["no", "off", "false", "False", "FALSE", "No", "'off'"])
def test_a_switch_may_be_off_in_any_way(written: str) -> None:
    assert sft(f"packing: {written}").packing is False


@pytest.mark.parametrize("written", ["none", "null", "~", "no", "off", "false", ""])
def test_full_fine_tuning_may_be_asked_for_in_any_way(written: str) -> None:
    assert sft(f"adapter: {written}").adapter is None


@pytest.mark.parametrize("word", ["no", "on", "2024-01-01", "1:30", "1_0.5.0", "a#b", "0x1z"])
def test_words_that_old_yaml_takes_for_something_else_are_text(word: str) -> None:
    assert sft(f"chat_template: {word}").chat_template == word


def test_names_of_columns_are_text() -> None:
    assert sft("columns: {prompt: '1', no: a, 2: b}").columns == {"prompt": "1", "no": "a", "2": "b"}


def test_json_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_bytes(b'\xef\xbb\xbf{"seed": 5, "stages": [{"sft": {"data": ["a", "b"]}}]}')
    assert load_recipe(path).stages[0].settings == SFT(data=("a", "b"), output="runs/recipe", seed=5)


def sft(line: str) -> SFT:
    settings = parse_recipe(f"stages:\n  - sft:\n      data: a\n      {line}\n").stages[0].settings
    assert isinstance(settings, SFT)
    return settings
