"""Memory that runs out: real failures of the allocator, in passes over some size, and what becomes of the run."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from luthier.data.batches import TokenBatch, cut
from luthier.data.sequences import TokenSequence
from luthier.errors import MemoryPlanError
from luthier.objectives.loss import Loss
from luthier.shortage import ran_out
from luthier.training.checkpoints import Checkpoints
from luthier.training.loop import evaluate_loss, fit, train_step
from luthier.training.run import Run

RunOf = Callable[..., Run]
RowsOf = Callable[..., list[TokenSequence]]
Objective = Callable[[torch.nn.Module, TokenBatch], Loss]


def too_much() -> torch.Tensor:
    """More than any machine has."""
    return torch.empty(2**56, dtype=torch.float32)


def short_of(objective: Objective, tokens: int) -> Objective:
    """The objective on a machine that has memory for so many tokens: it fails when half of the work is done."""

    def failing(network: torch.nn.Module, batch: TokenBatch) -> Loss:
        loss = objective(network, batch)
        if batch.num_tokens > tokens:
            loss.per_unit.sum().backward(retain_graph=True)
            too_much()
        return loss

    return failing


def trained(run: Run) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.state.tensors().items()}


def test_what_the_allocator_and_python_say_is_known() -> None:
    with pytest.raises(RuntimeError) as allocator:
        too_much()
    with pytest.raises(MemoryError) as numpy:
        np.empty(2**55)
    assert ran_out(allocator.value)
    assert ran_out(numpy.value)
    assert ran_out(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert ran_out(RuntimeError("could not create a primitive"))  # oneDNN, for products that it has no memory for
    assert not ran_out(RuntimeError("could not create a primitive descriptor"))
    assert not ran_out(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_memory_that_runs_out_halves_the_micro_batch_and_the_step_goes_on(
    run_of: RunOf, caplog: pytest.LogCaptureFixture
) -> None:
    """From all in one pass, 60 to 100 tokens, to passes of at most 40: the same weights as with 40 from the start,
    since what a failed pass left is gone.
    """
    ample, short = run_of(micro_batch_tokens=40, dropout=0.1), run_of(dropout=0.1)
    short.objective = short_of(short.objective, 40)
    with caplog.at_level(logging.WARNING):
        told = [train_step(short) for _ in range(3)]
    bound = short.state.progress.micro_batch_tokens
    assert bound is not None
    assert "memory has run out" in caplog.text
    ample.state.progress.micro_batch_tokens = bound
    assert [m["loss"] for m in told] == [train_step(ample)["loss"] for _ in range(3)]
    assert all(torch.equal(tensor, trained(ample)[name]) for name, tensor in trained(short).items())
    assert [m["step"] for m in told] == [1, 2, 3]


def test_the_gradient_of_a_step_that_was_cut_smaller_is_the_same(run_of: RunOf) -> None:
    ample, short = run_of(), run_of()
    short.objective = short_of(short.objective, 40)
    expected, found = train_step(ample), train_step(short)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert found["tokens"] == expected["tokens"]


def test_a_pass_that_cannot_be_cut_ends_the_run_with_a_setting_to_change(run_of: RunOf) -> None:
    run = run_of()
    run.objective = short_of(run.objective, 3)
    with pytest.raises(MemoryPlanError, match=r"in a pass of \d+ tokens that cannot .* gradient_checkpointing: 1"):
        fit(run)


def test_an_evaluation_is_cut_smaller_too(run_of: RunOf, rows_of: RowsOf) -> None:
    run, rows = run_of(eval_fraction=0.1, eval_every=100), rows_of(12, seed=4)
    run.eval_items = rows
    whole = run.objective
    run.objective = short_when_evaluating(whole, 40)
    fit(run)
    assert run.state.progress.micro_batch_tokens is not None
    rows_cut = cut(rows, None)
    assert evaluate_loss(run.state.network, rows_cut, whole) == pytest.approx(run.state.progress.best_loss, rel=1e-6)


def short_when_evaluating(objective: Objective, tokens: int) -> Objective:
    def failing(network: torch.nn.Module, batch: TokenBatch) -> Loss:
        if not network.training and batch.num_tokens > tokens:
            too_much()
        return objective(network, batch)

    return failing


def test_a_run_that_goes_on_keeps_its_smaller_micro_batches(run_of: RunOf, tmp_path: Path) -> None:
    whole = run_of(dropout=0.1)
    whole.objective = short_of(whole.objective, 40)
    fit(whole)
    first = run_of(dropout=0.1, checkpoints=Checkpoints(tmp_path, keep_last=9, fingerprint="f"), save_every=2)
    ample = first.objective
    first.objective = short_of(ample, 40)
    fit(first)
    again = run_of(dropout=0.1)
    Checkpoints(tmp_path, keep_last=9, fingerprint="f").load(tmp_path / "step-00000002", again.state)
    assert again.room.tokens == whole.room.tokens
    fit(again)
    assert all(torch.equal(tensor, trained(whole)[name]) for name, tensor in trained(again).items())


def test_what_a_step_holds_is_made_without_effect(run_of: RunOf) -> None:
    """The optimizer's state is there before the first step, and the run is the one that made it in its first step."""
    plain, held = run_of(weight_decay=0.1), run_of(weight_decay=0.1)
    held.state.hold_all()
    held.state.drop_gradients()
    fit(plain)
    fit(held)
    assert all(torch.equal(tensor, trained(plain)[name]) for name, tensor in trained(held).items())
