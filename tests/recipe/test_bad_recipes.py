"""Each bad recipe is answered with the line, the field, what is wrong and the nearest valid name."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.errors import RecipeError
from luthier.recipe import LoRA, load_recipe, parse_recipe
from luthier.recipe.stages import STAGE_SETTINGS

SFT = "stages:\n  - sft:\n      data: qa.jsonl\n"
KNOWN_LORA = ", ".join(LoRA.model_fields)

BAD = {  # the recipe, and the one complaint about it
    "field": (
        SFT + "      learning_rte: 1",
        '4: stages[0].sft.learning_rte: unknown field; did you mean "learning_rate"?',
    ),
    "peer_field": (SFT + "      lr: 2e-5", '4: stages[0].sft.lr: unknown field; did you mean "learning_rate"?'),
    "peer_length": (
        SFT + "      cutoff_len: 9",
        '4: stages[0].sft.cutoff_len: unknown field; did you mean "max_length"?',
    ),
    "dashed_field": (
        SFT + "      batch-size: 9",
        '4: stages[0].sft.batch-size: unknown field; did you mean "batch_size"?',
    ),
    "top_field": ("modle: a\n" + SFT, '1: modle: unknown field; did you mean "model"?'),
    "nested_field": (
        SFT + "      adapter:\n        lora_alpha: 3",
        '5: stages[0].sft.adapter.lora_alpha: unknown field; did you mean "alpha"?',
    ),
    "far_field": (
        SFT + "      adapter: {zzz: 1}",
        f"4: stages[0].sft.adapter.zzz: unknown field; known are {KNOWN_LORA}",
    ),
    "stage": ("stages:\n  - stf: {data: a}", '2: stages[0].stf: unknown stage; did you mean "sft"?'),
    "far_stage": (
        "stages:\n  - curate: {}",
        f"2: stages[0].curate: unknown stage; known are {', '.join(STAGE_SETTINGS)}",
    ),
    "adapter_type": (
        SFT + "      adapter:\n        type: lroa",
        '5: stages[0].sft.adapter.type: unknown type; did you mean "lora"?',
    ),
    "adapter_word": (SFT + "      adapter: dorra", '4: stages[0].sft.adapter: unknown type; did you mean "dora"?'),
    "adapter_number": (
        SFT + "      adapter: 3",
        "4: stages[0].sft.adapter: expected settings (name: value), got 3",
    ),
    "rank": (SFT + "      adapter: {r: 0}", "4: stages[0].sft.adapter.r: expected at least 1, got 0"),
    "alpha": (SFT + "      adapter: {alpha: 0}", "4: stages[0].sft.adapter.alpha: expected more than 0.0, got 0"),
    "choice": (
        SFT + "      schedule: cosin",
        '4: stages[0].sft.schedule: expected one of "constant", "cosine", "linear", "wsd", got "cosin"; '
        'did you mean "cosine"?',
    ),
    "union": (
        SFT + "      eval_every: epochs",
        '4: stages[0].sft.eval_every: expected a whole number or "epoch", got "epochs"; did you mean "epoch"?',
    ),
    "list_entry": (
        SFT + "      report_to: [wand]",
        '4: stages[0].sft.report_to[0]: expected one of "mlflow", "tensorboard", "trackio", "wandb", got "wand"; '
        'did you mean "wandb"?',
    ),
    "later_list_entry": (
        SFT + "      freeze:\n        - a\n        - 7",
        "6: stages[0].sft.freeze[1]: expected text, got 7; put it in quotes",
    ),
    "dtype": (
        "dtype: fp61\n" + SFT,
        '1: dtype: expected one of "bf16", "fp16", "fp32", got "fp61"; did you mean "fp16"?',
    ),
    "whole_number": (SFT + "      epochs: 1.5", "4: stages[0].sft.epochs: expected a whole number, got 1.5"),
    "truth_for_number": (
        SFT + "      batch_size: true",
        "4: stages[0].sft.batch_size: expected a whole number, got true",
    ),
    "word_for_number": (
        SFT + "      batch_size: yes",
        '4: stages[0].sft.batch_size: expected a whole number, got "yes"',
    ),
    "number_for_truth": (SFT + "      packing: maybe", '4: stages[0].sft.packing: expected true or false, got "maybe"'),
    "number_for_text": (
        SFT + "      chat_template: 3",
        "4: stages[0].sft.chat_template: expected text, got 3; put it in quotes",
    ),
    "no_value": (SFT + "      seed:", "4: stages[0].sft.seed: expected a whole number, got nothing"),
    "not_finite": (
        SFT + "      learning_rate: 1e999",
        "4: stages[0].sft.learning_rate: expected a finite number, got Infinity",
    ),
    "not_a_number": (
        SFT + "      learning_rate: .nan",
        '4: stages[0].sft.learning_rate: expected a number, got ".nan"',
    ),
    "below": ("seed: -1\n" + SFT, "1: seed: expected at least 0, got -1"),
    "above": (SFT + "      eval_fraction: 1", "4: stages[0].sft.eval_fraction: expected less than 1.0, got 1"),
    "no_data": ("seed: 1\nstages:\n  - sft:\n      epochs: 1", "3: stages[0].sft.data: is required; add it"),
    "empty_data": ("stages:\n  - sft: {data: ''}", '2: stages[0].sft.data: expected text that is not empty, got ""'),
    "steps": (
        SFT + "      gradient_checkpointing: -1",
        '4: stages[0].sft.gradient_checkpointing: expected at least 0 or "selective", got -1',
    ),
    "no_stages": ("seed: 1", "1: stages: is required; add it"),
    "empty_stages": ("seed: 1\nstages: []", "2: stages: expected at least one entry, got an empty list"),
    "mapped_stages": ("stages:\n  sft: {data: a}", "1: stages: expected a list, got names with values"),
    "bare_stage": ("stages:\n  - sft", '2: stages[0]: the stage has no settings; write "sft: {data: ...}"'),
    "stage_of_two": (
        "stages:\n  - sft: {data: a}\n    pretrain: {data: b}",
        '2: stages[0]: expected one stage with its settings, such as "sft: {data: rows.jsonl}"',
    ),
    "stage_number": ("stages:\n  - sft: 3", "2: stages[0].sft: expected settings (name: value), got 3"),
    "model_in_stage": (
        "stages:\n  - sft: {data: a}\n  - sft:\n      data: a\n      model: b",
        "5: stages[1].sft.model: belongs to the whole recipe; say model once, at the top",
    ),
    "mask_of_plain_text": (
        "stages:\n  - pretrain:\n      data: a\n      train_on: last",
        '4: stages[0].pretrain.train_on: expected "all", got "last"',
    ),
    "mix": (
        "stages:\n  - pretrain:\n      data: a\n      mix: {b: 0.5, c: 0.5}",
        "4: stages[0].pretrain.mix: the shares leave nothing for data; let them add up to less than 1",
    ),
    "mix_share": (
        "stages:\n  - pretrain:\n      data: a\n      mix:\n        b.txt: 30",
        "5: stages[0].pretrain.mix.b.txt: expected less than 1.0, got 30",
    ),
    "decay": (
        SFT + "      decay_ratio: 0.1",
        "4: stages[0].sft.decay_ratio: the cosine schedule has none; drop it or choose schedule: wsd",
    ),
    "decay_of_wsd": (
        SFT + "      schedule: wsd\n      decay_ratio: none",
        "5: stages[0].sft.decay_ratio: the wsd schedule needs one; leave it out for 0.1",
    ),
    "warmup": (
        SFT + "      schedule: wsd\n      warmup_ratio: 0.95",
        "5: stages[0].sft.warmup_ratio: warm-up and decay together take more than all steps; lower one of them",
    ),
    "freeze": (
        SFT + "      freeze: '*.wte'",
        "4: stages[0].sft.freeze: an adapter leaves the whole model frozen; drop freeze or set adapter: none",
    ),
    "evaluation": (
        SFT + "      eval_every: 5",
        "4: stages[0].sft.eval_every: there is nothing to evaluate on; give eval_data or eval_fraction",
    ),
    "two_evaluations": (
        SFT + "      eval_data: b\n      eval_fraction: 0.1",
        "5: stages[0].sft.eval_fraction: eval_data already names what to evaluate on; leave one of the two out",
    ),
    "patience": (
        SFT + "      early_stopping: 2",
        "4: stages[0].sft.early_stopping: needs evaluations; give eval_data or eval_fraction, and eval_every",
    ),
    "twice": (SFT + "      seed: 1\n      seed: 2", "5: stages[0].sft.seed: given twice, first on line 4; keep one"),
    "alias": (
        "model: &m a\noutput: *m\n" + SFT,
        "1: output: aliases (*name) are not read in recipes; write the value out",
    ),
    "tag": (
        "model: !!python/name:os.system a\n" + SFT,
        "1: model: tags are not read in recipes; remove !!python/name:os.system",
    ),
    "list_as_name": ("? [a]\n: 1\n" + SFT, "1: a name must be text, not a list or a mapping"),
    "tab": ("seed: 1\nstages:\n\t- sft: {data: a}", "3: a tab stands where YAML wants spaces; indent with spaces"),
    "two_documents": (
        SFT + "---\n" + SFT,
        '4: a second document starts here; a recipe is one document, so remove the "---"',
    ),
    "colon": (
        "seed: 1\nmodel: a: b\n" + SFT,
        "2: this is not YAML (mapping values are not allowed here); check colons, quotes and indentation",
    ),
    "empty": ("# nothing\n", "1: the file is empty; a recipe names at least its stages"),
    "text": ("just words", '1: expected settings (name: value), got "just words"'),
    "control_character": ("seed: 1\nmodel: \0", "2: this is not text (it holds U+0000); is it a recipe?"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_recipe_is_answered_with_line_field_and_remedy(name: str) -> None:
    text, complaint = BAD[name]
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, name="recipe.yaml")
    assert str(caught.value) == f"recipe.yaml:{complaint}"


def test_all_that_is_wrong_is_said_at_once_in_the_order_of_the_file() -> None:
    text = "stages:\n  - sft: {dat: a}\n  - stf: {data: a}\nseed: x\nseed: 3\noutput: [a]\n"
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, name="r.yaml")
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        ["r.yaml:2", "stages[0].sft.data"],
        ["r.yaml:2", "stages[0].sft.dat"],
        ["r.yaml:3", "stages[1].stf"],
        ["r.yaml:5", "seed"],
        ["r.yaml:6", "output"],
    ]


def test_a_missing_recipe_is_said_with_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"^nowhere\.yaml: there is no such file in .*; check the path$"):
        load_recipe("nowhere.yaml")


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot be read .*; a recipe is a YAML file$"):
        load_recipe(tmp_path)


def test_a_binary_file_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\x00\xff\xfe")
    with pytest.raises(RecipeError, match=r"model\.gguf: this is not text in UTF-8; a recipe is a YAML file$"):
        load_recipe(tmp_path / "model.gguf")


def test_values_nested_beyond_reason_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"^recipe:1: the values are nested too deeply for a recipe$"):
        parse_recipe("[" * 5000 + "]" * 5000)


@settings(deadline=None)
@given(st.data())
def test_a_damaged_recipe_is_read_or_refused_and_never_crashes(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from([bad for bad, _ in BAD.values()]))
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    written = data.draw(st.text("[]{}:,-#&*!|>'\"%@`?~<\n\t\r\0 a1.e\ud800", max_size=4))
    try:
        parse_recipe(text[:start] + written + text[end:], name="r.yaml")
    except RecipeError as error:
        assert all(line.startswith("r.yaml:") for line in str(error).splitlines())  # noqa: PT017 - reading is fine too
