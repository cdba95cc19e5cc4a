"""A run that was stopped and goes on is the run that was never stopped, bit for bit."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from luthier.data.sequences import TokenSequence
from luthier.training.callbacks import Callback, Metrics, MetricsFile, read_metrics
from luthier.training.checkpoints import Checkpoints
from luthier.training.loop import fit
from luthier.training.run import Run

RowsOf = Callable[..., list[TokenSequence]]
RunOf = Callable[..., Run]

MEASURED = {"seconds", "tokens_per_second", "memory_bytes"}
DRIVER = Path(__file__).with_name("killed_run.py")


@pytest.fixture(scope="module")
def go_on(
    run_of: RunOf, rows_of: RowsOf, stop_at: Callable[[int | None], Callback]
) -> Callable[..., tuple[dict[str, Tensor], list[Metrics]]]:
    def go_on(folder: Path, *, stop: int | None, save_every: int) -> tuple[dict[str, Tensor], list[Metrics]]:
        """From the newest checkpoint to the end or to the interruption: final tensors, and metrics so far."""
        run = run_of(
            dropout=0.1,
            epochs=4,
            schedule="linear",
            eval_fraction=0.1,
            eval_every=2,
            save_every=save_every,
            checkpoints=Checkpoints(folder / "checkpoints", keep_last=2, fingerprint="one"),
            eval_items=rows_of(4),
            callbacks=[MetricsFile(folder / "metrics.jsonl"), stop_at(stop)],
        )
        assert run.checkpoints is not None
        if found := run.checkpoints.latest():
            run.checkpoints.load(found, run.state)
        if stop is None:
            fit(run)
        else:
            with pytest.raises(KeyboardInterrupt):
                fit(run)
        lines = read_metrics(folder / "metrics.jsonl")
        return run.state.tensors(), [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]

    return go_on


@settings(max_examples=8, deadline=None)
@given(stops=st.lists(st.integers(1, 12), min_size=1, max_size=3).map(sorted), save_every=st.integers(1, 5))
def test_a_run_interrupted_at_any_steps_ends_as_the_one_that_was_not(
    go_on: Callable[..., tuple[dict[str, Tensor], list[Metrics]]],
    tmp_path_factory: pytest.TempPathFactory,
    stops: list[int],
    save_every: int,
) -> None:
    tensors, lines = go_on(tmp_path_factory.mktemp("whole"), stop=None, save_every=save_every)
    folder = tmp_path_factory.mktemp("stopped")
    for stop in stops:
        go_on(folder, stop=stop, save_every=save_every)
    found, found_lines = go_on(folder, stop=None, save_every=save_every)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in found.items())
    assert found_lines == lines


def test_a_run_that_is_over_stays_as_it_is(
    go_on: Callable[..., tuple[dict[str, Tensor], list[Metrics]]], tmp_path: Path
) -> None:
    first, lines = go_on(tmp_path, stop=None, save_every=1)
    again, lines_again = go_on(tmp_path, stop=None, save_every=1)
    assert lines_again == lines
    assert all(torch.equal(value, first[name]) for name, value in again.items())


@pytest.mark.parametrize(
    "broken", [pytest.param([], id="sound"), pytest.param([5, 6, 7], id="goes back", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("num_kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_as_the_one_that_was_left_alone(
    tmp_path: Path, num_kills: int, broken: list[int]
) -> None:
    """Signal 9 in the middle of steps, evaluations, checkpoints and ways back; bytes of all that is left behind are
    compared.
    """
    command = [sys.executable, str(DRIVER), str(tmp_path), str(num_kills), "0", *map(str, broken)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"killed {num_kills} times"
