"""A run had once more from its manifest has the same bytes, and what cannot be the same is said or refused."""

import json
import logging
import subprocess
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from luthier.cli.run import command
from luthier.errors import CheckpointError, RecipeError
from luthier.pipeline.reproduce import Manifest, reproduce
from luthier.pipeline.run import run_recipe
from luthier.recipe.document import parse_recipe
from luthier.training import loop


@pytest.fixture
def first(chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The manifest of a run of two stages with dropout, cut into small micro-batches by its memory plan."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(12)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapter = "{type: lora, r: 4, dropout: 0.3}"
    stage = f"sft: {{data: rows.jsonl, epochs: 1, batch_size: 4, learning_rate: 0.01, adapter: {adapter}}}"
    run_recipe(parse_recipe(f"model: {chat_model}\noutput: first\ndtype: fp32\nstages:\n  - {stage}\n  - {stage}\n"))
    return Path("first/manifest.json")


def edited(path: Path, **changes: Any) -> Path:
    other = path.with_name("edited.json")
    other.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return other


def test_the_same_manifest_gives_the_same_bytes(first: Path) -> None:
    recipe, summaries, different = reproduce(first)
    assert recipe.output == "first-again"
    assert [summary.steps for summary in summaries] == [3, 3]
    assert different == []
    for name in (
        "00-sft/adapter/adapter_model.safetensors",
        "01-sft/adapter/adapter_model.safetensors",
        "model/model.safetensors",
    ):
        assert Path("first", name).read_bytes() == Path("first-again", name).read_bytes()
    assert reproduce(Path("first-again/manifest.json"), output="third")[2] == []


def test_steps_are_cut_as_they_were_and_threads_are_as_many(first: Path) -> None:
    """Other cuts draw other dropout, so that the bytes differ shows that the manifest's cuts are used."""
    content = json.loads(first.read_text())
    small = dict.fromkeys(content["micro_batch_tokens"], 64)
    other = edited(first, micro_batch_tokens=small, hardware=content["hardware"] | {"threads": 1})
    before, seen = torch.get_num_threads(), []
    recipe, _, different = reproduce(
        other, output="cut", listeners=lambda *_: seen.append(torch.get_num_threads()) or []
    )
    assert [stage.settings.micro_batch_tokens for stage in recipe.stages] == [64, 64]
    assert different == ["00-sft/adapter", "01-sft/adapter", "model"]
    assert (seen, torch.get_num_threads()) == ([1, 1], before)


def test_other_data_or_another_base_is_refused(first: Path) -> None:
    content = json.loads(first.read_text())
    with pytest.raises(CheckpointError, match=r"the run had another .*tiny than there is here"):
        reproduce(edited(first, base_model=content["base_model"] | {"sha256": "0"}))
    Path("rows.jsonl").write_text(Path("rows.jsonl").read_text().replace("What", "Who"))
    with pytest.raises(CheckpointError, match=r"the run had another rows\.jsonl than there is here"):
        reproduce(first)
    assert not Path("first-again").exists()


def test_what_rounds_otherwise_is_said(first: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = json.loads(first.read_text())
    other = edited(first, versions=content["versions"] | {"torch": "1.0"})
    with caplog.at_level(logging.WARNING):
        reproduce(other)
    assert f"numbers may differ in their last digits: torch {torch.__version__}, then 1.0" in caplog.text


def test_the_command_says_whether_the_bytes_are_the_same(first: Path) -> None:
    done = CliRunner().invoke(
        command("run"), ["--from-manifest", str(first), "--output", "again"], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert "the same bytes as the first time" in done.output
    content = json.loads(first.read_text())
    content["artifacts"]["model"]["sha256"] = "0"
    done = CliRunner().invoke(command("run"), ["--from-manifest", str(edited(first, **content)), "--output", "third"])
    assert "other bytes than the first time: model" in done.output


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "name a recipe, or a manifest"),
        (["a.yaml", "--from-manifest", "b.json"], "name a recipe, or a manifest"),
        (["a.yaml", "--output", "c"], "--output goes with --from-manifest"),
    ],
)
def test_a_command_that_means_nothing_is_refused(words: list[str], complaint: str) -> None:
    done = CliRunner().invoke(command("run"), words)
    assert done.exit_code == 2
    assert complaint in done.output


@pytest.mark.parametrize(
    ("text", "complaint"), [("", "cannot|can be read"), ("{}", "lacks recipe, versions"), ("[]", "lacks")]
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(RecipeError, match=complaint):
        Manifest.read(tmp_path / "manifest.json")


def test_the_state_of_the_users_repository_is_kept(first: Path) -> None:
    assert json.loads(first.read_text())["repository"] is None
    for words in (
        ["init", "-q"],
        ["add", "rows.jsonl"],
        ["-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "c"],
    ):
        subprocess.run(["git", *words], check=True)
    reproduce(first)
    repository = json.loads(Path("first-again/manifest.json").read_text())["repository"]
    assert (len(repository["commit"]), repository["changed"]) == (40, True)


def test_a_run_whose_memory_ran_out_says_so_when_it_is_had_once_more(
    first: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps cut smaller halfway draw other dropout from then on, and no recipe can name that."""
    whole, calls = loop._add_gradients, count()

    def failing(*arguments: Any, **named: Any) -> Any:
        if next(calls) == 5:
            raise MemoryError
        return whole(*arguments, **named)

    assert json.loads(first.read_text())["shortages"] == {}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_add_gradients", failing)
        reproduce(first, output="short")
    ((stage, tokens),) = json.loads(Path("short/manifest.json").read_text())["shortages"].items()
    with caplog.at_level(logging.WARNING):
        reproduce(Path("short/manifest.json"))
    assert f"memory ran out in {stage}, whose micro-batches then had up to {tokens} tokens" in caplog.text
