"""What a user may get wrong, as a user would: one sentence that names it, exit code 1, and never a traceback."""

import json
import shlex
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.adapters.inject import inject
from luthier.adapters.peft_format import save_adapter
from luthier.cli.main import main
from luthier.recipe.adapters import LoRA

RECIPE = """\
model: {model}
output: run
dtype: fp32
stages:
  - sft: {{data: rows.jsonl, batch_size: 4, max_steps: 2, adapter: {{r: 2}}}}
"""

ON_THE_COMMAND_LINE = {
    "rnu": 'did you mean "run"',
    "run": "name a recipe",
    "run recipe.yaml twice": "unexpected extra argument (twice)",
    "run --colour recipe.yaml": "--colour",
    "sft --data rows.jsonl --epohcs 3": "--epochs",
    "sft --data rows.jsonl --epochs many": '--epochs: expected a whole number, got "many"',
    "sft --data rows.jsonl --format shargpt": "'sharegpt'",
    "sft": "--data: is required",
    "data": "Missing command",
    "data valdate rows.jsonl": "No such command 'valdate'",
    "generate --temperature -1 hello": "--temperature",
}

IN_FILES = {
    "run none.yaml": "none.yaml: there is no such file",
    "run folder": "folder: cannot be read",
    "run rows.jsonl": "rows.jsonl:2: this is not YAML",
    "run empty.jsonl": "the file is empty",
    "data validate empty.jsonl": "empty.jsonl: holds no rows",
    "data validate folder": "folder: the folder holds no files",
    "data stats row.jsonl": 'is "rows.jsonl" meant?',
    "data convert table.xlsx --output new.jsonl": "this kind of file cannot be read",
    "data convert rows.jsonl --output empty.jsonl/new.jsonl": "cannot be written",
    "data preview rows.jsonl --model folder": "folder: has no .safetensors file",
    "data preview rows.jsonl --model smollm2-135": 'did you mean "smollm2-135m"?',
    "generate --model MODEL --adapter folder hello": "no adapter here",
    "report folder": "holds no run",
    "verify loss none.yaml": "none.yaml: there is no such file",
}

IN_THE_RECIPE = {
    "r: 2": ("rank: 2", 'recipe.yaml:5: stages[0].sft.adapter.rank: unknown field; did you mean "r"?'),
    "batch_size: 4": (
        "batch_size: four",
        'recipe.yaml:5: stages[0].sft.batch_size: expected a whole number, got "four"',
    ),
    "output: run": ("output: rows.jsonl", "rows.jsonl cannot be written"),
    "output: run\n": ("output: rows.jsonl/run\n", "rows.jsonl/run cannot be written"),
    "data: rows.jsonl": ("data: rows.json", 'is "rows.jsonl" meant?'),
    "data: rows": ("format: sharegpt, data: rows", 'has no "conversations"'),
    "max_steps: 2": ("chat_template: none.jinja", "chat_template: none.jinja cannot be read (No such file"),
    "adapter: {r": ("adapter: {target_modules: q_prj, r", 'did you mean "q_proj"?'),
}


@pytest.fixture
def place(chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a user who has a recipe, rows, and things that are not what they should be."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    rows = [json.dumps({"question": f"{i}?", "answer": f"{i}{i}."}) for i in range(24)]
    files = {"rows.jsonl": "\n".join(rows), "empty.jsonl": "", "table.xlsx": "x"}
    files["recipe.yaml"] = RECIPE.format(model=chat_model)
    for name, text in files.items():
        Path(name).write_text(text)
    Path("folder").mkdir()
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], command: str) -> str:
    """The sentence that the command ends with, exit code 1."""
    with pytest.raises(SystemExit) as end:
        main(shlex.split(command))
    assert end.value.code == 1
    error = capsys.readouterr().err
    sentences = [line for line in error.splitlines() if line.startswith("luthier: ")]
    assert len(sentences) == 1
    assert "Traceback" not in error
    return sentences[0]


@pytest.mark.parametrize("command", ON_THE_COMMAND_LINE)
def test_a_mistyped_command_is_one_sentence(command: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ON_THE_COMMAND_LINE[command] in refused(capsys, command)


@pytest.mark.parametrize("command", IN_FILES)
def test_a_file_that_is_not_what_it_should_be_is_one_sentence(
    command: str, chat_model: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert IN_FILES[command] in refused(capsys, command.replace("MODEL", str(chat_model)))


@pytest.mark.parametrize("right", IN_THE_RECIPE)
def test_a_wrong_line_of_a_recipe_is_one_sentence(right: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong, expected = IN_THE_RECIPE[right]
    recipe = Path("recipe.yaml")
    recipe.write_text(recipe.read_text().replace(right, wrong, 1))
    assert expected in refused(capsys, "run recipe.yaml")


@pytest.mark.parametrize("command", ["generate --adapter theirs hello", "merge --adapter theirs --output merged"])
def test_an_adapter_of_another_model_is_refused(
    command: str, chat_model: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    theirs = LlamaForCausalLM(LlamaConfig(vocab_size=99, **sizes))
    inject(theirs, LoRA(r=2), seed=0)
    save_adapter(theirs, place / "theirs", base_model="theirs")
    assert "theirs" in refused(capsys, f"{command} --model {chat_model}")
    assert not (place / "merged").exists()


def test_a_folder_with_another_recipes_run_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "recipe.yaml"])
    before = (place / "run" / "00-sft" / "done.json").read_bytes()
    Path("recipe.yaml").write_text(Path("recipe.yaml").read_text().replace("r: 2", "r: 4"))
    capsys.readouterr()
    assert "run holds a run of another recipe" in refused(capsys, "run recipe.yaml")
    assert (place / "run" / "00-sft" / "done.json").read_bytes() == before
