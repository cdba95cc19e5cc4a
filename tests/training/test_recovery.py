"""A run whose steps fail one after the other goes back before them and leaves them out, or ends with a reason."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.data.sequences import TokenSequence
from luthier.errors import TrainingError
from luthier.training.callbacks import Callback, MetricsFile, read_metrics
from luthier.training.checkpoints import Checkpoints
from luthier.training.loop import fit
from luthier.training.run import Run

RunOf = Callable[..., Run]
Broken = Callable[[Run, Sequence[int]], None]


def saving(run_of: RunOf, folder: Path, *callbacks: Callback, **further: Any) -> Run:
    """Of 12 steps with dropout, each saved, from the newest checkpoint on."""
    kept = Checkpoints(folder / "checkpoints", keep_last=2, fingerprint="one")
    listeners = [MetricsFile(folder / "metrics.jsonl"), *callbacks]
    run = run_of(
        **{"epochs": 4, "dropout": 0.1, "save_every": 1, "checkpoints": kept, "callbacks": listeners} | further
    )
    if found := kept.latest():
        kept.load(found, run.state)
    return run


def same(ones: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return ones.keys() == others.keys() and all(torch.equal(one, others[name]) for name, one in ones.items())


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(folder / "metrics.jsonl")}


def test_the_run_goes_back_and_leaves_out_what_failed(
    run_of: RunOf, broken: Broken, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps 6 to 8 fail; the last good checkpoint is that of step 5, so the rest follows from its weights."""
    run = saving(run_of, tmp_path)
    broken(run, [5, 6, 7])
    fit(run)
    assert run.state.progress.left_out == [5, 6, 7]
    assert list(losses(tmp_path)) == [1, 2, 3, 4, 5, 9, 10, 11, 12]
    sentence = "step 8: the gradient was not finite for 3 steps in a row; going back to step-00000005, and from there "
    assert sentence + "without steps 6 to 8" in caplog.text
    other = saving(run_of, tmp_path / "other")
    other.state.progress.left_out = [5, 6, 7]
    fit(other)
    assert same(other.state.tensors(), run.state.tensors())
    assert losses(tmp_path / "other") == losses(tmp_path)


def test_what_was_seen_before_the_trouble_is_left_out_too(run_of: RunOf, broken: Broken, tmp_path: Path) -> None:
    """Ten steps before the first that failed, and from the checkpoint up to them the same steps as before."""
    run = saving(run_of, tmp_path, epochs=8, save_every=4)
    broken(run, [19, 20, 21])
    kept = run.checkpoints
    assert kept is not None
    kept.keep_last = 1
    fit(run)
    assert run.state.progress.left_out == list(range(16, 22))
    again = saving(run_of, tmp_path / "again", epochs=8, save_every=None)
    again.state.progress.step = 0
    again.checkpoints = Checkpoints(tmp_path / "again" / "checkpoints", keep_last=1, fingerprint="one")
    again.checkpoints.save(again.state)
    broken(again, [19, 20, 21])
    fit(again)
    assert again.state.progress.left_out == list(range(9, 22))
    assert losses(tmp_path / "again").keys() == {*range(1, 10), 23, 24}


@pytest.mark.parametrize("stop", [4, 5, 7, 9, 11])
def test_a_run_stopped_before_or_after_it_went_back_ends_as_the_one_that_was_not(
    run_of: RunOf, broken: Broken, stop_at: Callable[[int], Callback], tmp_path: Path, stop: int
) -> None:
    """Every third step saved, so that going back comes with steps done again; 4 and 5 stop the first of their kind."""
    whole = saving(run_of, tmp_path / "whole", save_every=3)
    broken(whole, [5, 6, 7])
    fit(whole)
    cut_short = saving(run_of, tmp_path / "cut", stop_at(stop), save_every=3)
    broken(cut_short, [5, 6, 7])
    with pytest.raises(KeyboardInterrupt):
        fit(cut_short)
    resumed = saving(run_of, tmp_path / "cut", save_every=3)
    broken(resumed, [5, 6, 7])
    fit(resumed)
    assert same(resumed.state.tensors(), whole.state.tensors())
    assert resumed.state.progress == whole.state.progress
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.parametrize("when", ["written", "going on"])
def test_a_run_stopped_in_the_middle_of_going_back_ends_as_the_one_that_was_not(
    run_of: RunOf, broken: Broken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Once when the checkpoint is about to be written anew, once when it is and the run is about to go on."""
    whole = saving(run_of, tmp_path / "whole")
    broken(whole, [5, 6, 7])
    fit(whole)
    stopped = saving(run_of, tmp_path / "cut")
    broken(stopped, [5, 6, 7])
    go_back = Checkpoints.go_back_to

    def interrupted(kept: Checkpoints, *given: Any, **further: Any) -> None:
        if when == "going on":
            go_back(kept, *given, **further)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "go_back_to", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(stopped)
    resumed = saving(run_of, tmp_path / "cut")
    broken(resumed, [5, 6, 7])
    fit(resumed)
    assert same(resumed.state.tensors(), whole.state.tensors())
    assert resumed.state.progress == whole.state.progress
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_the_same_trouble_soon_after_ends_the_run_with_cause_and_mend(
    run_of: RunOf, broken: Broken, tmp_path: Path
) -> None:
    run = saving(run_of, tmp_path)
    broken(run, [4, 5, 6, 7, 8, 9])
    with pytest.raises(TrainingError, match=r"step 10: .* 3 steps in a row, soon after .*; lower learning_rate"):
        fit(run)
    assert run.checkpoints is not None
    assert run.checkpoints.newest_good(12) == (tmp_path / "checkpoints" / "step-00000007", 7)


def test_other_trouble_later_is_gone_back_for_once_more(run_of: RunOf, broken: Broken, tmp_path: Path) -> None:
    run = saving(run_of, tmp_path)
    broken(run, [2, 3, 4, 7, 8, 9])
    fit(run)
    assert run.state.progress.left_out == [2, 3, 4, 7, 8, 9]
    assert list(losses(tmp_path)) == [1, 2, 6, 7, 11, 12]


def test_where_no_checkpoint_is_there_the_reason_is_said(run_of: RunOf, broken: Broken, tmp_path: Path) -> None:
    for run in (run_of(), saving(run_of, tmp_path)):
        broken(run, [0, 1, 2])
        with pytest.raises(TrainingError, match=r"^step 3: .*no checkpoint to go back to; lower learning_rate, or set"):
            fit(run)


def test_a_checkpoint_of_weights_that_are_no_numbers_is_never_written(
    run_of: RunOf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Something spoils a weight after step 7; step 8, which the next checkpoint would be of, and it are left out."""

    class Spoiling:
        def on_start(self, step: int, num_steps: int) -> None: ...

        def on_metrics(self, metrics: dict[str, Any]) -> None:
            if metrics["step"] == 7:
                next(iter(run.state.trained().values())).data[0] = float("nan")

        def on_end(self) -> None: ...

    run = saving(run_of, tmp_path, Spoiling(), save_every=4)
    with caplog.at_level(logging.WARNING):
        fit(run)
    assert "step 8: the weights or the optimizer's moments are not finite; going back to step-00000004" in caplog.text
    assert run.state.progress.left_out == [4, 5, 6, 7]
    assert run.state.is_finite()
    assert list(losses(tmp_path)) == [1, 2, 3, 4, 9, 10, 11, 12]


def test_an_optimizer_goes_back_to_having_no_moments(run_of: RunOf, tmp_path: Path) -> None:
    run = saving(run_of, tmp_path)
    assert run.checkpoints is not None
    first = run.checkpoints.save(run.state)
    start = {name: tensor.clone() for name, tensor in run.state.tensors().items()}
    run.settings = run.settings.model_copy(update={"save_every": None})
    fit(run)
    run.checkpoints.load(first, run.state)
    assert same(run.state.tensors(), start)


def test_the_best_checkpoint_stays_the_best_where_the_run_goes_back(
    run_of: RunOf, rows_of: Callable[..., list[TokenSequence]], broken: Broken, tmp_path: Path
) -> None:
    """A loss that falls at each evaluation: going back to step 5 makes that of step 4 the best again, and at the end
    the last is.
    """
    held_out = {"eval_items": rows_of(8), "eval_fraction": 0.1, "eval_every": 2}
    run = saving(run_of, tmp_path, **held_out)
    broken(run, [5, 6, 7])
    fit(run)
    evaluated = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [0, 2, 4, 6, 8, 10, 12]
    best = min(evaluated, key=lambda line: line["eval_loss"])
    assert run.state.progress.best_loss == best["eval_loss"]
    assert (tmp_path / "checkpoints" / "best").readlink().name == f"step-{best['step']:08d}"
    assert json.loads((tmp_path / "checkpoints" / "last" / "progress.json").read_text())["progress"]["left_out"]
