"""The command line from outside: what it costs, what it says, and how it ends."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.cli.main import COMMANDS, main


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "luthier.cli.main", *arguments], capture_output=True, text=True, check=False
    )


def ended(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out + captured.err


def test_help_names_every_command_without_torch_or_transformers() -> None:
    code = "import sys\nfrom luthier.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    heavy = "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code + heavy], capture_output=True, text=True, check=True)
    assert all(word in result.stdout for word in COMMANDS)
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("word", list(COMMANDS))
def test_every_command_explains_itself(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = ended(capsys, word, "--help")
    assert code == 0
    assert "Usage:" in text


def test_a_bad_recipe_is_one_sentence_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stages:\n  - sft:\n      data: rows.jsonl\n      learning_rte: 0.1\n")
    code, text = ended(capsys, "run", str(recipe))
    assert code == 1
    assert "recipe.yaml:4" in text
    assert '"learning_rate"' in text
    assert "Traceback" not in text


def test_a_bad_flag_names_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = ended(capsys, "sft", "--data", "rows.jsonl", "--adapter.r", "0")
    assert code == 1
    assert "--adapter.r" in text


def test_missing_data_is_refused_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = ended(capsys, "data", "validate", str(tmp_path / "none.jsonl"))
    assert code == 1
    assert "none.jsonl" in text


def test_validate_reports_each_bad_row_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "a", "answer": "b"}\n{"question": "a"}\n{"question": "c", "answer": "d"}\n')
    code, text = ended(capsys, "data", "validate", str(rows))
    assert code == 1
    assert "rows.jsonl:2" in text
    assert "3 rows: 2 good, 1 bad" in text


def test_run_prints_the_schema_of_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = ended(capsys, "run", "--schema")
    assert code == 0
    assert "stages" in json.loads(text)["properties"]
