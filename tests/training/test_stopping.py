"""A run that is asked to end finishes its step, leaves a checkpoint, and goes on as if it had never been asked."""

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from luthier.data.batches import TokenBatch
from luthier.data.sequences import TokenSequence
from luthier.objectives.loss import Loss
from luthier.training.callbacks import Metrics, MetricsFile, read_metrics
from luthier.training.checkpoints import Checkpoints
from luthier.training.loop import fit
from luthier.training.run import Run
from luthier.training.stopping import Stop, Stopped

RunOf = Callable[..., Run]
RowsOf = Callable[..., list[TokenSequence]]
Event = Callable[[], None]

MEASURED = ("seconds", "tokens_per_second", "memory_bytes")


class AskAt:
    """Asks for the end when the numbers of a step are told, its evaluation's or its own."""

    def __init__(self, stop: Stop, step: int, kind: str) -> None:
        self.stop, self.step, self.kind = stop, step, kind

    def on_start(self, step: int, num_steps: int) -> None: ...

    def on_metrics(self, metrics: Metrics) -> None:
        if metrics["step"] == self.step and self.kind in metrics:
            self.stop.ask()

    def on_end(self) -> None: ...


@pytest.fixture
def run_in(run_of: RunOf, rows_of: RowsOf) -> Callable[..., Run]:
    def run_in(folder: Path, stop: Stop, *others: AskAt, **given: object) -> Run:
        """Six steps, saved at each third, evaluated at each second; on from the newest checkpoint."""
        run = run_of(
            **{"epochs": 2, "dropout": 0.1, "eval_fraction": 0.1, "eval_every": 2, "save_every": 3, **given},
            checkpoints=Checkpoints(folder / "checkpoints", keep_last=2, fingerprint="one"),
            eval_items=rows_of(4),
            callbacks=[MetricsFile(folder / "metrics.jsonl"), stop, *others],
        )
        assert run.checkpoints is not None
        if found := run.checkpoints.latest():
            run.checkpoints.load(found, run.state)
        return run

    return run_in


def left(folder: Path) -> dict[str, object]:
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}
    texts = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.json")}
    lines = read_metrics(folder / "metrics.jsonl")
    return files | texts | {"metrics": [{k: v for k, v in one.items() if k not in MEASURED} for one in lines]}


@pytest.mark.parametrize(("step", "kind"), [(1, "loss"), (2, "loss"), (2, "eval_loss"), (3, "loss"), (4, "loss")])
def test_a_run_that_is_asked_to_end_goes_on_to_the_same_end(
    run_in: Callable[..., Run], tmp_path: Path, step: int, kind: str
) -> None:
    """Between two checkpoints, before an evaluation, after it, where a checkpoint is due, and with one before."""
    fit(run_in(tmp_path / "whole", Stop()))
    stop = Stop()
    run = run_in(tmp_path / "asked", stop, AskAt(stop, step, kind))
    with pytest.raises(Stopped):
        fit(run)
    assert run.state.progress.step == step
    again = run_in(tmp_path / "asked", Stop())
    assert again.state.progress.step == step
    fit(again)
    assert left(tmp_path / "asked") == left(tmp_path / "whole")


def test_an_evaluation_ends_at_once_and_is_made_when_the_run_goes_on(
    run_in: Callable[..., Run], tmp_path: Path
) -> None:
    fit(run_in(tmp_path / "whole", Stop()))
    stop = Stop()
    run = run_in(tmp_path / "asked", stop)
    objective = run.objective

    def asking(network: nn.Module, batch: TokenBatch) -> Loss:
        if not network.training and run.state.progress.step == 2:
            stop.ask()
            raise AssertionError("it goes on")
        return objective(network, batch)

    run.objective = asking
    with pytest.raises(Stopped):
        fit(run)
    again = run_in(tmp_path / "asked", Stop())
    assert again.state.progress.unevaluated
    fit(again)
    assert left(tmp_path / "asked") == left(tmp_path / "whole")


def test_no_checkpoint_is_made_of_weights_that_are_in_another_form(run_in: Callable[..., Run], tmp_path: Path) -> None:
    """As they may be while answers are sampled."""
    stop = Stop()
    run = run_in(tmp_path, stop)
    cut_step = run.cut

    def sampling(step: int) -> list[TokenBatch]:
        if step == 1:
            next(iter(run.state.trained().values())).detach().add_(1)
            stop.ask()
        return cut_step(step)

    run.cut = sampling  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        fit(run)
    assert run.state.progress.step == 1
    assert run.checkpoints.latest() is None


def test_outside_a_loop_the_end_comes_at_once() -> None:
    with pytest.raises(Stopped):
        Stop().ask()


def test_who_asks_before_the_first_step_gets_no_step(run_in: Callable[..., Run], tmp_path: Path) -> None:
    stop = Stop()
    with pytest.raises(Stopped):
        stop.ask()
    with pytest.raises(Stopped):
        fit(run_in(tmp_path, stop))
    assert not (tmp_path / "checkpoints").exists()


def test_the_end_that_is_asked_for_is_no_error() -> None:
    """Nothing that looks for errors catches it, so a judge that is asked again after one does not swallow it."""
    assert not issubclass(Stopped, Exception)
