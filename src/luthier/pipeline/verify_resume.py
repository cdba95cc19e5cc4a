"""Bit-exact resume, shown on the user's own recipe: a run that was stopped ends as the one that was not.

The first stage trains a few steps uninterrupted, and again with a kill in the middle of a step; a freshly loaded model
then goes on from the checkpoint. Every trained parameter and the optimizer's state must be the same bits. All happens
in a temporary folder. Evaluations are left out: they take long and leave nothing in the weights.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from luthier.errors import VerificationError
from luthier.models.load import load
from luthier.pipeline.train import Summary, train
from luthier.recipe.document import Recipe, Stage
from luthier.recipe.training import Training
from luthier.training.callbacks import Callback, Metrics

__all__ = ["ResumeProof", "verify_resume"]


@dataclass(frozen=True, slots=True)
class ResumeProof:
    """What was the same, bit for bit. resumed_after: the step whose checkpoint the second run went on from."""

    num_steps: int
    resumed_after: int
    num_parameters: int
    num_optimizer_tensors: int
    final_loss: float


class _Stopped(Exception):
    """The kill in the middle of a run."""


class _StopAt:
    """Ends a run once `step` is computed and before it is saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_start(self, step: int, num_steps: int) -> None: ...

    def on_metrics(self, metrics: Metrics) -> None:
        if metrics["step"] == self.step:
            raise _Stopped

    def on_end(self) -> None: ...


class _Start:
    """Remembers the step that a run began at."""

    def __init__(self) -> None:
        self.step = 0

    def on_start(self, step: int, num_steps: int) -> None:
        self.step = step

    def on_metrics(self, metrics: Metrics) -> None: ...

    def on_end(self) -> None: ...


def verify_resume(
    recipe: Recipe, *, num_steps: int = 4, while_stopped: Callable[[Path], object] = lambda folder: None
) -> ResumeProof:
    """Trains the recipe's first stage for `num_steps`, uninterrupted and stopped half way, and compares.

    while_stopped: called with the stopped run's folder before it goes on. Raises VerificationError, naming the first
    tensor that differs, or where the second run did not go on from its checkpoint.
    """
    with tempfile.TemporaryDirectory() as name:
        whole, stopped = Path(name) / "whole", Path(name) / "stopped"
        summary = _train(recipe, whole, num_steps=num_steps)
        if summary.steps < 2:
            raise VerificationError("a run of one step cannot be stopped half way; give more rows, epochs or steps")
        kept = summary.steps // 2
        try:
            _train(recipe, stopped, num_steps=num_steps, save_every=kept, listener=_StopAt(kept + 1))
        except _Stopped:
            while_stopped(stopped)
        start = _Start()
        _train(recipe, stopped, num_steps=num_steps, save_every=kept, listener=start)
        if start.step != kept:
            raise VerificationError(
                f"the stopped run went on from step {start.step} and not from its checkpoint of step {kept}; "
                "the checkpoint is damaged or missing"
            )
        tensors = _compare(whole, stopped)
    num_parameters = sum(name.startswith("parameter/") for name in tensors)
    return ResumeProof(summary.steps, kept, num_parameters, len(tensors) - num_parameters, summary.final_loss)


def _train(
    recipe: Recipe, folder: Path, *, num_steps: int, save_every: int | None = None, listener: Callback | None = None
) -> Summary:
    stage = _shortened(recipe.stages[0], num_steps, save_every)
    model = load(recipe.model, dtype=stage.settings.dtype)
    _, summary = train(stage.word, stage.settings, model, folder, callbacks=[listener] if listener else [])
    return summary


def _shortened(stage: Stage, num_steps: int, save_every: int | None) -> Stage:
    no_evaluation = {"eval_data": None, "eval_fraction": 0.0, "eval_every": None, "early_stopping": None}
    changed: dict[str, Any] = {"max_steps": num_steps, "save_every": save_every, "resume": True, "report_to": ()}
    settings: Training = stage.settings.model_copy(update=no_evaluation | changed)
    return Stage(stage.word, settings)


def _compare(whole: Path, resumed: Path) -> dict[str, Tensor]:
    """The tensors that both runs ended with; raises VerificationError at the first that differs."""
    expected, found = _last_checkpoint(whole), _last_checkpoint(resumed)
    for name in sorted(expected[0].keys() | found[0].keys()):
        if name not in expected[0] or name not in found[0]:
            raise VerificationError(f"only one of the two runs ended with {name}; the checkpoint lacks it")
        ours, theirs = expected[0][name], found[0][name]
        if not _same_bits(ours, theirs):
            raise VerificationError(
                f"{name} differs after going on from a checkpoint, by {float((ours - theirs).abs().max()):.1e} at "
                "most; the resumed run is not the run that was stopped"
            )
    if expected[1] != found[1]:
        raise VerificationError(f"the runs counted otherwise: {expected[1]} uninterrupted, {found[1]} resumed")
    return expected[0]


def _last_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    last = folder / "checkpoints" / "last"
    progress: dict[str, Any] = json.loads((last / "progress.json").read_text(encoding="utf-8"))["progress"]
    return load_file(last / "state.safetensors"), progress


def _same_bits(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    return torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))
