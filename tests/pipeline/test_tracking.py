"""Whole stages with trackers, a deterministic mode and their cost: nothing of these changes what is trained."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from luthier.errors import RecipeError
from luthier.pipeline.run import run_recipe
from luthier.recipe.document import Recipe, parse_recipe
from luthier.training.callbacks import Callback, read_metrics

WEIGHTS = "00-sft/adapter/adapter_model.safetensors"


@pytest.fixture
def place(chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "base").symlink_to(chat_model)
    return tmp_path


def recipe(output: str, **more: object) -> Recipe:
    """Six steps, a checkpoint after every second, an evaluation before the first and after the last."""
    given = {"data": "rows.jsonl", "epochs": 2, "batch_size": 4, "eval_fraction": 0.25, "adapter": {"r": 4}}
    stage = given | {"save_every": 2, "eval_every": 6, "dtype": "fp32"} | more
    return parse_recipe(json.dumps({"model": "base", "output": output, "stages": [{"sft": stage}]}))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_tracked_run_that_goes_on_tells_each_step_once_and_ends_with_the_same_bytes(
    place: Path, stop_at: Callable[[int], Callback]
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_recipe(recipe("plain"))
    tracked = recipe("tracked", report_to="tensorboard")
    with pytest.raises(KeyboardInterrupt):
        run_recipe(tracked, listeners=lambda *_: [stop_at(5)])
    run_recipe(tracked)
    read = EventAccumulator("tracked/00-sft/tensorboard").Reload()
    assert [event.step for event in read.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in read.Scalars("eval_loss")] == [0, 6]
    assert Path("tracked", WEIGHTS).read_bytes() == Path("plain", WEIGHTS).read_bytes()


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"report_to: wandb needs a package that is not here"):
        run_recipe(recipe("run", report_to=["wandb"]))
    assert not Path("run").exists()


def test_the_time_of_a_run_that_goes_on_adds_up(place: Path, stop_at: Callable[[int], Callback]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe("run"), listeners=lambda *_: [stop_at(5)])
    (summary,) = run_recipe(recipe("run"))
    lines = read_metrics(Path("run/00-sft/metrics.jsonl"))
    assert len(lines) == 8
    assert summary.seconds == pytest.approx(sum(line["seconds"] for line in lines))
    assert "seconds" not in Path("run/manifest.json").read_text()


def test_the_deterministic_mode_trains_and_leaves_no_trace_in_the_process(place: Path) -> None:
    run_recipe(recipe("plain"))
    run_recipe(recipe("deterministic", deterministic=True))
    assert not torch.are_deterministic_algorithms_enabled()
    assert Path("deterministic", WEIGHTS).read_bytes() == Path("plain", WEIGHTS).read_bytes()
