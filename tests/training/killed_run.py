"""Trains one tiny run whole, then again in processes that get signal 9 at random moments, and compares the outcomes.

Run by test_resume.py as `killed_run.py FOLDER KILLS SEED [STEP...]`. The gradients of these steps, counted from 0, are
not finite, so the run goes back for them. Processes are forked, so that each costs no import. Ends with 1 and says what
differs where a killed and resumed run is not, bit for bit, the run that was left alone.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from conftest import break_steps, make_rows, make_run
from luthier.training.callbacks import MetricsFile, read_metrics
from luthier.training.checkpoints import Checkpoints
from luthier.training.loop import fit

MEASURED = {"seconds", "tokens_per_second", "memory_bytes"}  # differ from run to run by nature


def train(folder: Path, broken: list[int]) -> None:
    """From the newest checkpoint to the end: 12 steps with dropout, each saved, every other evaluated on known rows."""
    run = make_run(
        dropout=0.1,
        epochs=4,
        eval_fraction=0.1,
        eval_every=2,
        save_every=1,
        checkpoints=Checkpoints(folder / "checkpoints", keep_last=2, fingerprint="one"),
        eval_items=make_rows(4),
        callbacks=[MetricsFile(folder / "metrics.jsonl")],
    )
    break_steps(run, broken)
    assert run.checkpoints is not None
    if found := run.checkpoints.latest():
        run.checkpoints.load(found, run.state)
    fit(run)


def is_killed(folder: Path, broken: list[int], after_seconds: float | None) -> bool:
    """Trains in a process of its own; whether the signal, if any, came before its end."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            train(folder, broken)
            code = 0
        finally:
            os._exit(code)
    if after_seconds is not None:
        time.sleep(after_seconds)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit("the training failed by itself")
    return os.WIFSIGNALED(status)


def outcome(folder: Path) -> dict[str, object]:
    """All that a run leaves behind, but for measured times."""
    files = sorted(path for path in (folder / "checkpoints").rglob("*") if path.is_file())
    lines = [{k: v for k, v in line.items() if k not in MEASURED} for line in read_metrics(folder / "metrics.jsonl")]
    links = {name: os.readlink(folder / "checkpoints" / name) for name in ("last", "best")}
    return {"metrics": lines, **links, **{str(p.relative_to(folder)): p.read_bytes() for p in files}}


def main(folder: Path, num_kills: int, seed: int, broken: list[int]) -> None:
    torch.set_num_threads(1)
    draw, started = random.Random(seed), time.perf_counter()
    is_killed(folder / "whole", broken, None)
    whole_seconds = time.perf_counter() - started
    expected, killed = outcome(folder / "whole"), 0
    while killed < num_kills:
        name = f"killed-{killed:03d}"
        while killed < num_kills and is_killed(folder / name, broken, draw.uniform(0, whole_seconds)):
            killed += 1
        is_killed(folder / name, broken, None)
        found = outcome(folder / name)
        if found != expected:
            differing = [key for key in {*expected, *found} if expected.get(key) != found.get(key)]
            sys.exit(f"{name}: {', '.join(sorted(differing))} differ from the run that was left alone")
    print(f"killed {killed} times")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), [int(step) for step in sys.argv[4:]])
