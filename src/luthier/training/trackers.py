"""Trackers: a run's numbers besides in the form of tools that people look at runs with, each an extra of its own.

What a tracker writes lies with the stage unless the user's environment says otherwise, nobody is asked to log in, and
no tracker ends a training: what one raises is said once, and the run goes on without it. A run that goes on has the
same run in its tracker: `tracking.json` in the stage's folder keeps its id there and how many lines of metrics it has
heard, and a line that is computed again is not told again. What a killed process had told and the tracker not yet
written is lost to the tracker; metrics.jsonl has it.
"""

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from luthier.errors import RecipeError
from luthier.files import write_whole
from luthier.recipe.settings import flat
from luthier.recipe.training import Training
from luthier.training.callbacks import Metrics, read_metrics

__all__ = ["TRACKERS", "MLflow", "TensorBoard", "Tracked", "Tracker", "Tracking", "Trackio", "WandB", "tracking"]

logger = logging.getLogger(__name__)

_PROJECT = "luthier"
_WANDB_LOCAL = {"offline", "disabled", "dryrun"}  # modes without a login
_MLFLOW_PARAMETERS, _MLFLOW_LETTERS = 100, 500  # that one call may hold, and the value of one, on any server
_NO_MLFLOW_NAME = re.compile(r"[^\w\-./: ]")


@dataclass(frozen=True, slots=True)
class Tracked:
    """A stage's run, as trackers know it. id: what the tracker calls it; empty for one that is new to it.

    step: how many are done. environment: the user's, whose word goes before ours.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    environment: Mapping[str, str]
    id: str = ""
    step: int = 0


class Tracker(Protocol):
    """One tool. It may raise anything; whoever calls it lets no error through.

    takes_back: a run that goes on takes back what it has of later steps, so that these are told again.
    """

    takes_back: bool

    def begin(self, run: Tracked) -> str:
        """Makes the run known, with its settings where it is new, or goes on with it; returns its id."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step or of an evaluation after it."""

    def end(self, *, whole: bool) -> None:
        """Closes the run; whole: it was not interrupted."""


class TensorBoard:
    """Scalars for TensorBoard, in the stage's `tensorboard/`."""

    takes_back = True

    def __init__(self, environment: Mapping[str, str]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.make = SummaryWriter

    def begin(self, run: Tracked) -> str:
        self.writer = self.make(str(run.folder / "tensorboard"), purge_step=run.step + 1)
        if not run.id:
            lines = [f"    {name}: {value}" for name, value in flat(run.settings)]
            self.writer.add_text("settings", "\n".join(lines))
        return run.id or "tensorboard"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def end(self, *, whole: bool) -> None:
        self.writer.close()


class WandB:
    """Weights & Biases, offline in the stage's `wandb/` unless WANDB_MODE says otherwise; `wandb sync` sends it later.

    Only what is told here is recorded: no output, code, repository or machine. Raises RecipeError where it is to be
    online and cannot log in, for it would ask for a key.
    """

    takes_back = False

    def __init__(self, environment: Mapping[str, str]) -> None:
        import wandb

        self.wandb = wandb
        if environment.get("WANDB_MODE", "offline") not in _WANDB_LOCAL:
            self._refuse_without_key()

    def begin(self, run: Tracked) -> str:
        quiet = {"silent": True, "console": "off", "save_code": False, "x_disable_stats": True}
        private = {"disable_git": True, "disable_code": True, "x_disable_meta": True, "x_disable_machine_info": True}
        mode = run.environment.get("WANDB_MODE", "offline")
        self.run = self.wandb.init(
            project=run.environment.get("WANDB_PROJECT") or _PROJECT,
            name=run.name,
            id=run.id or uuid4().hex[:8],
            resume="allow",
            mode=mode,
            dir=run.environment.get("WANDB_DIR") or str(run.folder),
            config=dict(run.settings),
            settings=self.wandb.Settings(**quiet, **private, reinit="create_new"),
        )
        return str(self.run.id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def end(self, *, whole: bool) -> None:
        self.run.finish(exit_code=0 if whole else 1)

    def _refuse_without_key(self) -> None:
        try:
            reason = "" if self.wandb.login(prompt=False) else "there is no key"
        except self.wandb.errors.Error as error:
            reason = str(error)
        if reason:
            raise RecipeError(
                f"report_to: wandb cannot log in ({reason}); run `wandb login`, or unset WANDB_MODE to stay offline"
            )


class MLflow:
    """MLflow: SQLite in the stage's `mlflow.db`, or the server that MLFLOW_TRACKING_URI names."""

    takes_back = False

    def __init__(self, environment: Mapping[str, str]) -> None:
        import alembic
        import mlflow
        import sqlalchemy

        del alembic, sqlalchemy  # mlflow asks for them once it writes, in words that do not name our extra
        for name in ("alembic", "mlflow"):
            logging.getLogger(name).setLevel(logging.WARNING)  # they tell of each table that they make
        self.mlflow = mlflow

    def begin(self, run: Tracked) -> str:
        address = run.environment.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.folder.resolve() / 'mlflow.db'}"
        self.client = self.mlflow.MlflowClient(tracking_uri=address)
        if run.id:
            self.client.update_run(run.id, status="RUNNING")
            self.id = run.id
        else:
            self.id = self._new(run)
        return self.id

    def _new(self, run: Tracked) -> str:
        name = run.environment.get("MLFLOW_EXPERIMENT_NAME") or _PROJECT
        found = self.client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self.client.create_experiment(name)
        made = str(self.client.create_run(experiment, run_name=run.name).info.run_id)
        parameter = self.mlflow.entities.Param
        told = [parameter(_mlflow_name(key), value[:_MLFLOW_LETTERS]) for key, value in flat(run.settings)]
        for first in range(0, len(told), _MLFLOW_PARAMETERS):
            self.client.log_batch(made, params=told[first : first + _MLFLOW_PARAMETERS])
        return made

    def log(self, step: int, values: Mapping[str, float]) -> None:
        metric, now = self.mlflow.entities.Metric, int(1000 * time.time())
        told = [metric(_mlflow_name(name), float(value), now, step) for name, value in values.items()]
        self.client.log_batch(self.id, metrics=told)

    def end(self, *, whole: bool) -> None:
        self.client.set_terminated(self.id, status="FINISHED" if whole else "KILLED")


class Trackio:
    """Trackio, in its own folder (TRACKIO_DIR, or Hugging Face's cache), where `trackio show` looks.

    It knows runs by their names, so the id is part of it.
    """

    takes_back = False

    def __init__(self, environment: Mapping[str, str]) -> None:
        import trackio

        self.trackio = trackio

    def begin(self, run: Tracked) -> str:
        made = run.id or uuid4().hex[:8]
        with redirect_stdout(StringIO()):  # it prints what it does
            self.run = self.trackio.init(
                project=_PROJECT,
                name=f"{run.name} {made}",
                config=dict(run.settings),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        return made

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def end(self, *, whole: bool) -> None:
        with redirect_stdout(StringIO()):
            self.trackio.finish()


TRACKERS: dict[str, Callable[[Mapping[str, str]], Tracker]] = {
    "mlflow": MLflow,
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WandB,
}


class Tracking:
    """A callback that tells one tracker; after the first error of the tracker, nobody."""

    def __init__(self, word: str, tracker: Tracker, run: Tracked) -> None:
        self.word, self.run = word, run
        self.tracker: Tracker | None = tracker
        self.lines = read_metrics(run.folder / "metrics.jsonl")  # before a run that goes on takes some back

    def on_start(self, step: int, num_steps: int) -> None:
        kept = [line for line in self.lines if line["step"] <= step] if step else []
        before = self._read().get(self.word) if step else None
        self.heard, self.told = 0, self._told(len(kept), before)
        self.run = replace(self.run, step=step, id=before["id"] if before else "")
        self._try(self._begin)
        for line in kept:
            self.on_metrics(line)

    def on_metrics(self, metrics: Metrics) -> None:
        self.heard += 1
        if self.heard > self.told:
            self._try(lambda tracker: tracker.log(metrics["step"], _numbers(metrics)))

    def on_end(self) -> None:
        self._try(lambda tracker: tracker.end(whole=sys.exception() is None))
        self.tracker = None

    def _told(self, num_kept: int, before: dict[str, Any] | None) -> int:
        """How many lines of metrics the tracker has: all that there ever were, but for those that it takes back."""
        if self.tracker is None or before is None:
            return 0
        return num_kept if self.tracker.takes_back else max(len(self.lines), before["told"])

    def _begin(self, tracker: Tracker) -> None:
        self.run.folder.mkdir(parents=True, exist_ok=True)
        made = tracker.begin(self.run)
        known = self._read() | {self.word: {"id": made, "told": self.told}}
        write_whole(self.run.folder / "tracking.json", json.dumps(known, indent=1) + "\n")

    def _read(self) -> dict[str, Any]:
        path = self.run.folder / "tracking.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}

    def _try(self, told: Callable[[Tracker], None]) -> None:
        if self.tracker is None:
            return
        try:
            told(self.tracker)
        except Exception as error:  # whatever a tool or its network raises, the training is worth more
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.warning("report_to: %s is left out from here on: %s", self.word, reason)
            with suppress(Exception):
                self.tracker.end(whole=False)
            self.tracker = None


def tracking(settings: Training, folder: Path, *, environment: Mapping[str, str] = os.environ) -> list[Tracking]:
    """The callbacks that `report_to` names, for a stage that writes into `folder`; nothing is opened yet.

    Raises RecipeError for one whose package is not installed.
    """
    run = Tracked(
        f"{folder.resolve().parent.name}/{folder.name}", folder, settings.model_dump(mode="json"), environment
    )
    words = dict.fromkeys(settings.report_to)
    return [Tracking(word, _tracker(word, environment), run) for word in words]


def _tracker(word: str, environment: Mapping[str, str]) -> Tracker:
    try:
        return TRACKERS[word](environment)
    except ImportError as error:
        raise RecipeError(
            f"report_to: {word} needs a package that is not here ({error}); install it with pip install "
            f'"luthier[{word}]"'
        ) from error


def _numbers(metrics: Metrics) -> dict[str, float]:
    """What can be drawn. An evaluation's own seconds are told apart from those of the step before it."""
    evaluation = "eval_loss" in metrics
    return {
        f"eval_{name}" if evaluation and not name.startswith("eval_") else name: value
        for name, value in metrics.items()
        if isinstance(value, int | float) and name != "step"
    }


def _mlflow_name(name: str) -> str:
    return _NO_MLFLOW_NAME.sub("_", name)
