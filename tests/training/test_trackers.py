"""Each tracker's own reader finds every line of a run once, whatever ended the parts of the run.

A tracker whose package is not installed is left out here; `make test-track` installs them all.
"""

import json
import logging
import math
import os
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import pytest

from luthier.errors import RecipeError
from luthier.recipe.training import SFT, Tracker
from luthier.training.callbacks import MetricsFile
from luthier.training.trackers import TRACKERS, Tracked, Tracking, tracking

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the tools' own

NEEDED = {"mlflow": "mlflow", "tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}
SECRET = "0123456789abcdef0123456789abcdef01234567"
Points = dict[str, list[tuple[int, float]]]


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where Trackio writes, which it reads from the environment when it is imported; keys that nobody may write."""
    folder = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(name, raising=False)
        patch.setenv("TRACKIO_DIR", str(folder))
        patch.setenv("WANDB_API_KEY", SECRET)
        yield folder


def part(folder: Path, first: int, last: int, *words: str, end: BaseException | None = None) -> None:
    """A run that goes on after step `first`, from 0 with an evaluation, and ends after step `last`."""
    settings = SFT(data="rows.jsonl", report_to=words, learning_rate=0.125)
    callbacks = [MetricsFile(folder / "metrics.jsonl"), *tracking(settings, folder)]
    for callback in callbacks:
        callback.on_start(first, 10)
    lines = [
        {"step": step, "loss": 1 / step, "rewards/a": math.nan, "seconds": 0.5} for step in range(first + 1, last + 1)
    ]
    before = [] if first else [{"step": 0, "eval_loss": 9.0, "seconds": 7.0}]
    with suppress(KeyboardInterrupt):
        try:
            for line in before + lines:
                for callback in callbacks:
                    callback.on_metrics(line)
            if end is not None:
                raise end
        finally:
            for callback in callbacks:
                callback.on_end()


def read_tensorboard(folder: Path, home: Path) -> tuple[Points, str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard")).Reload()
    points = {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    (settings,) = read.Tensors("settings/text_summary")
    return points, settings.tensor_proto.string_val[0].decode()


def read_mlflow(folder: Path, home: Path) -> tuple[Points, str]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("luthier").experiment_id])
    assert (run.info.run_name, run.info.status) == ("run/00-sft", "FINISHED")
    points = {
        name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics
    }
    return points, json.dumps(run.data.params)


def read_trackio(folder: Path, home: Path) -> tuple[Points, str]:
    points: Points = {}
    with sqlite3.connect(home / "luthier.db") as database:
        ((run, config),) = database.execute("select run_name, config from configs where run_name like 'run/00-sft %'")
        for step, metrics in database.execute(
            "select step, metrics from metrics where run_name = ? order by id", (run,)
        ):
            for name, value in json.loads(metrics).items():
                points.setdefault(name, []).append((step, float(value)))
    database.close()
    return points, config.decode()


def read_wandb(folder: Path, home: Path) -> tuple[Points, str]:
    points: Points = {}
    ends, names, settings = [], set(), ""
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for record in whole_wandb_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                names.add((record.run.run_id, record.run.display_name, record.run.project))
                settings = settings or str(record.run.config)
            elif kind == "exit":
                ends.append(record.exit.exit_code)
            elif kind == "history":
                items = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                for name, value in items.items():
                    if not name.startswith("_"):
                        points.setdefault(name, []).append((items["_step"], float(value)))
    assert ends == [1, 0]
    assert [(name, project) for _, name, project in names] == [("run/00-sft", "luthier")]
    return points, settings


def whole_wandb_records(path: Path) -> list[Any]:
    """Up to the run's end, which W&B's own process writes a moment after it was told."""
    deadline = time.monotonic() + 20
    while True:
        records = list(wandb_records(path.read_bytes()))
        if any(record.WhichOneof("record_type") == "exit" for record in records) or time.monotonic() > deadline:
            return records
        time.sleep(0.05)


def wandb_records(data: bytes) -> Iterator[Any]:
    """The records of W&B's file: 7 bytes, then LevelDB's log format, blocks of 32 KiB with pieces of records."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, whole = 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # no head of a piece fits into what is left of the block
            at += 2**15 - at % 2**15
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


READERS: dict[str, Callable[[Path, Path], tuple[Points, str]]] = {
    "mlflow": read_mlflow,
    "tensorboard": read_tensorboard,
    "trackio": read_trackio,
    "wandb": read_wandb,
}


@pytest.mark.parametrize("word", TRACKERS)
def test_a_run_that_goes_on_is_one_run_with_every_line_once(word: str, tmp_path: Path, home: Path) -> None:
    """Steps 4 and 5 are done twice, after an interruption that came between them and a checkpoint of step 3."""
    pytest.importorskip(NEEDED[word])
    folder = tmp_path / "run" / "00-sft"
    part(folder, 0, 5, word, end=KeyboardInterrupt())
    part(folder, 3, 7, word)
    points, settings = READERS[word](folder, home)
    assert [step for step, _ in points["loss"]] == [1, 2, 3, 4, 5, 6, 7]
    assert [value for _, value in points["loss"]] == pytest.approx([1 / step for step in range(1, 8)])
    assert (points["eval_loss"], points["eval_seconds"]) == ([(0, 9.0)], [(0, 7.0)])
    assert len(points["seconds"]) == 7
    assert len(points["rewards/a"]) == 7
    assert "learning_rate" in settings
    assert "0.125" in settings
    written = [path for place in (folder, home) for path in place.rglob("*") if path.is_file()]
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]


class Recorder:
    """A tracker that keeps the steps that it hears, and raises from the one named on."""

    takes_back = False

    def __init__(self, heard: list[int], *, breaks_at: int = 100) -> None:
        self.heard, self.breaks_at, self.ends = heard, breaks_at, []

    def begin(self, run: Tracked) -> str:
        return run.id or "made"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self.breaks_at:
            raise OSError("no space\nleft")
        self.heard.append(step)

    def end(self, *, whole: bool) -> None:
        self.ends.append(whole)


def recorded(folder: Path, tracker: Recorder) -> Tracking:
    return Tracking("recorder", tracker, Tracked("run", folder, {}, {}))


def test_a_tracker_that_raises_is_left_out_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Recorder([], breaks_at=2)
    callback = recorded(tmp_path, tracker)
    with caplog.at_level(logging.WARNING):
        callback.on_start(0, 4)
        for step in (1, 2, 3, 4):
            callback.on_metrics({"step": step})
        callback.on_end()
    assert (tracker.heard, tracker.ends) == ([1], [False])
    assert caplog.messages == ["report_to: recorder is left out from here on: no space left"]


def test_twice_interrupted_is_still_told_once(tmp_path: Path) -> None:
    """Killed after step 7 and, gone on after step 4, after step 5: the metrics file has forgotten 6 and 7 by then."""
    heard: list[int] = []
    for first, last in ((0, 7), (4, 5), (4, 9)):
        callbacks = [recorded(tmp_path, Recorder(heard)), MetricsFile(tmp_path / "metrics.jsonl")]
        for callback in callbacks:
            callback.on_start(first, 10)
        for step in range(first + 1, last + 1):
            for callback in reversed(callbacks):
                callback.on_metrics({"step": step})
        callbacks[1].on_end()
    assert heard == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_a_tracker_that_comes_later_hears_what_went_before(tmp_path: Path) -> None:
    part(tmp_path, 0, 5)
    heard: list[int] = []
    callback = recorded(tmp_path, Recorder(heard))
    callback.on_start(3, 10)
    callback.on_metrics({"step": 4, "loss": 0.25})
    assert heard == [0, 1, 2, 3, 4]


def test_a_run_from_the_beginning_is_another_run(tmp_path: Path) -> None:
    heard: list[int] = []
    for _ in range(2):
        callback = recorded(tmp_path, Recorder(heard))
        callback.on_start(0, 2)
        callback.on_metrics({"step": 1})
        callback.on_end()
    assert heard == [1, 1]


@pytest.mark.parametrize(("word", "package"), NEEDED.items())
def test_a_missing_package_is_refused_with_its_extra(
    word: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (package, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    with pytest.raises(
        RecipeError, match=rf'report_to: {word} needs .*; install it with pip install "luthier\[{word}\]"'
    ):
        tracking(SFT(data="rows.jsonl", report_to=word), tmp_path)


def test_wandb_never_asks_for_a_key(tmp_path: Path) -> None:
    """In a process of its own, for the package remembers keys."""
    pytest.importorskip("wandb")
    code = "from luthier.training.trackers import TRACKERS; import os; TRACKERS['wandb'](os.environ)"
    kept = {name: value for name, value in os.environ.items() if name != "WANDB_API_KEY"}
    environment = kept | {"WANDB_MODE": "online", "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert "RecipeError: report_to: wandb cannot log in (there is no key)" in ended.stderr


def test_the_recipes_words_are_the_trackers() -> None:
    assert set(TRACKERS) == set(get_args(Tracker))
