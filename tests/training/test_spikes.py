"""A step whose gradient is a spike is left out where that is asked for, on the device, and so again after a resume."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from luthier.data.batches import TokenBatch
from luthier.objectives.loss import Loss
from luthier.training.callbacks import Callback, MetricsFile, read_metrics
from luthier.training.checkpoints import Checkpoints
from luthier.training.loop import fit
from luthier.training.optimizers import step_if_finite
from luthier.training.run import Run
from luthier.training.spikes import is_spike, remembered, spike_bound

RunOf = Callable[..., Run]


def spiking(run: Run, steps: set[int], by: float = 1000.0) -> Run:
    """The same run with losses so many times as great at these steps, counted from 0."""
    sound = run.objective

    def objective(network: nn.Module, batch: TokenBatch) -> Loss:
        loss = sound(network, batch)
        return Loss(loss.per_unit * (by if run.state.progress.step in steps else 1.0), unit="tokens")

    run.objective = objective
    return run


@given(st.lists(st.floats(0, 1e6, width=32), max_size=200), st.floats(1.5, 20))
def test_what_is_remembered_says_the_same_as_all_norms(norms: list[float], factor: float) -> None:
    kept: list[float] = []
    for i, norm in enumerate(norms):
        assert spike_bound(kept, factor) == spike_bound(norms[:i], factor)
        assert is_spike(norm, kept, factor) == is_spike(norm, norms[:i], factor)
        kept = remembered(kept, norm)
    assert len(kept) <= 70
    assert remembered(kept, float("inf")) == kept


def test_a_new_usual_is_learned_within_25_steps() -> None:
    kept = [1.0] * 50
    spikes = 0
    while is_spike(100.0, kept):
        kept, spikes = remembered(kept, 100.0), spikes + 1
    assert spikes == 25


@pytest.mark.parametrize(
    ("norm", "bound", "moves"), [(1.0, 2.0, True), (2.0, 2.0, True), (2.1, 2.0, False), (float("nan"), 2.0, False)]
)
def test_the_device_decides_whether_a_step_is_taken(norm: float, bound: float, moves: bool) -> None:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    left_out = step_if_finite(optimizer, torch.tensor(norm), at_most=bound)
    assert float(left_out) == (not moves)
    assert bool((parameter != 1).any()) == moves


def test_a_spike_is_left_out_and_counted(run_of: RunOf, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    given = {"epochs": 9, "schedule": "constant", "callbacks": [MetricsFile(tmp_path / "metrics.jsonl")]}
    run = spiking(run_of(max_grad_spike=10, **given), {22, 24})
    fit(run)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if line["skipped"]] == [23, 25]
    assert run.state.progress.spikes == 2
    assert run.state.progress.skipped_steps == 0
    assert caplog.text.count("a spike; the step is left out") == 2
    taken = next(iter(run.state.optimizer.state.values()))["step"]
    assert int(taken) == len(lines) - 2


def test_without_the_setting_no_step_is_a_spike(run_of: RunOf, tmp_path: Path) -> None:
    run = spiking(run_of(epochs=9, callbacks=[MetricsFile(tmp_path / "metrics.jsonl")]), {22})
    fit(run)
    assert run.state.progress.spikes == 0
    assert run.state.progress.norms == []
    assert not any("skipped" in line for line in read_metrics(tmp_path / "metrics.jsonl"))


def test_a_run_that_goes_on_leaves_out_the_same_steps(
    run_of: RunOf, stop_at: Callable[[int], Callback], tmp_path: Path
) -> None:
    def run(folder: Path, *callbacks: Callback) -> Run:
        kept = Checkpoints(folder, keep_last=2, fingerprint="one")
        run = run_of(max_grad_spike=10, epochs=9, save_every=5, checkpoints=kept, callbacks=callbacks)
        if found := kept.latest():
            kept.load(found, run.state)
        return spiking(run, {22, 24})

    whole, stopped = run(tmp_path / "whole"), run(tmp_path / "cut", stop_at(24))
    fit(whole)
    with pytest.raises(KeyboardInterrupt):
        fit(stopped)
    resumed = run(tmp_path / "cut")
    assert resumed.state.progress.step == 20
    fit(resumed)
    assert resumed.state.progress == whole.state.progress
    ours, theirs = resumed.state.tensors(), whole.state.tensors()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_an_overflow_of_fp16_is_no_spike_and_no_failure(run_of: RunOf) -> None:
    """The scale falls from 2^127 until gradients fit; its norms are inf, which the rule does not remember."""
    scaling = {"initial": 2.0**127, "ceiling": 2.0**127}
    run = run_of(dtype="fp16", loss_scaling=scaling, max_grad_spike=10, epochs=12)
    fit(run)
    assert run.state.progress.step == 36
    assert run.state.progress.loss_scale is not None
    assert run.state.progress.loss_scale < 2.0**127
    assert (run.state.progress.spikes, run.state.progress.left_out) == (0, [])
    assert 0 < len(run.state.progress.norms) < 36
