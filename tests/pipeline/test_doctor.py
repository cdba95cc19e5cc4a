"""What would spoil a run is found before it, with what to change; what is good raises no alarm."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from luthier.cli.doctor import command
from luthier.pipeline.doctor import Finding, Machine, check_data, check_machine, check_recipe

GOOD = Machine("2.13.0+cpu", 2, 2, frozenset({"avx512_bf16"}), 20 * 10**9, 90 * 10**9, (), has_driver=False)


def bad(found: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.level, f"{finding.what}; {finding.change}") for finding in found if finding.level != "good"]


@pytest.mark.parametrize(
    ("facts", "level", "words"),
    [
        ({"torch": "2.9.1"}, "problem", "torch 2.9.1 is too old; install torch 2.11 or newer"),
        ({"has_driver": True}, "problem", "there is a GPU, and torch 2.13.0+cpu does not see it"),
        ({"threads": 64}, "warning", "64 threads on 2 cores: they wait for one another; set OMP_NUM_THREADS=2"),
        ({"threads": 1}, "warning", "1 threads on 2 cores: the others are idle"),
        (
            {"flags": frozenset({"avx2"})},
            "warning",
            "has no bfloat16 products, so dtype: bf16 is slow; set dtype: fp32",
        ),
        ({"memory": 10**9}, "warning", "only 1.0 GB of memory are free"),
        ({"disk": 10**9}, "warning", "only 1.0 GB of disk are free here"),
    ],
)
def test_a_machine_is_judged_by_what_it_has(facts: dict[str, object], level: str, words: str) -> None:
    (one,) = bad(check_machine(replace(GOOD, **facts)))
    assert one[0] == level
    assert words in one[1]


@pytest.mark.parametrize(
    "facts", [{}, {"flags": None}, {"gpus": ("H200",), "has_driver": True, "flags": frozenset(), "threads": 1}]
)
def test_a_good_machine_raises_no_alarm(facts: dict[str, object]) -> None:
    found = check_machine(replace(GOOD, **facts))
    assert bad(found) == []
    assert len(found) >= 4


def test_this_machine_can_be_looked_at() -> None:
    here = Machine.here()
    assert 1 <= here.cores <= 4096
    assert here.memory > 10**8
    assert here.disk > 0


def test_a_cache_that_cannot_be_written_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "file" / "cache"))
    ((level, words),) = bad(check_machine(GOOD))
    assert level == "problem"
    assert "cache cannot be written" in words


@pytest.fixture
def recipe(chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(8)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = f"model: {chat_model}\noutput: run\nstages:\n  - sft: {{data: rows.jsonl, adapter: {{r: 4}}}}\n"
    Path("recipe.yaml").write_text(text)
    return Path("recipe.yaml")


def test_a_good_recipe_raises_no_alarm_and_says_what_it_takes(recipe: Path) -> None:
    found = check_recipe(recipe)
    assert bad(found) == []
    assert re.match(r"00-sft: takes \d+\.\d GB of \d+", found[1].what)
    assert "run: takes about 0.0 GB of disk" in found[2].what


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("sft", "sfd", 'unknown stage "sfd"|sfd'),
        ("rows.jsonl", "gone.jsonl", "00-sft: .*gone.jsonl"),
        ("r: 4", "r: 4000", "00-sft: .*4000"),
        ("output: run", "output: run\nseed: x", "seed"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_a_problem(recipe: Path, old: str, new: str, words: str) -> None:
    recipe.write_text(recipe.read_text().replace(old, new, 1))
    problems = [finding.what for finding in check_recipe(recipe) if finding.level == "problem"]
    assert len(problems) == 1
    assert re.search(words, problems[0])


def test_a_disk_that_is_too_small_is_a_problem(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.pipeline.doctor.free_bytes", lambda folder: 10)
    ((level, words),) = bad(check_recipe(recipe))
    assert level == "problem"
    assert "lower keep_last" in words


def test_bad_rows_are_a_problem_and_the_first_is_named(recipe: Path) -> None:
    assert bad(check_data(Path("rows.jsonl"))) == []
    with Path("rows.jsonl").open("a") as file:
        file.write('{"prompt": "no answer"}\n')
    ((level, words),) = bad(check_data(Path("rows.jsonl")))
    assert level == "problem"
    assert "8 of 9 rows are good" in words
    assert "rows.jsonl" in words.partition("first bad one")[2]


def test_the_command_ends_with_1_where_something_is_to_be_mended(recipe: Path) -> None:
    assert CliRunner().invoke(command("doctor"), ["recipe.yaml", "rows.jsonl"]).exit_code == 0
    done = CliRunner().invoke(command("doctor"), ["gone.jsonl"])
    assert done.exit_code == 1
    assert "mend" in done.output
