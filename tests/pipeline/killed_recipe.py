"""Runs a recipe, then again and again with kills, and compares what is left; used by `test_killed_recipe`.

Arguments: the recipe, whose output is relative; how it is killed; a number; a seed. `fork` and `spawn` kill it `number`
times, at moments drawn one from each of equal parts of the run's own time, in random order; a forked run is the same
command without the seconds that its imports take, and `term` asks a forked one to end. `writes` kills runs just before
they open for writing, make, rename or remove a file, every `number`th such event of a run from the `seed`th on; a file
opened for writing is left empty. Ends with 1 and says what differs where a killed run that went on is not, byte for
byte, the run that was left alone.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from luthier.cli.main import main as luthier
from luthier.cli.run import run_on_screen

IMPORTED = (LlamaForCausalLM, PreTrainedTokenizerFast, run_on_screen)  # here already when a run is forked
MEASURED = {  # differ by nature
    *("seconds", "milliseconds_per_step", "tokens_per_second", "memory_bytes", "energy_joules"),
    "sha256",  # of these
    *("rollout/seconds", "rollout/tokens_per_second"),
}
OF_ITS_DAY = {"report.html", "plan.json"}  # tell times, and the memory that was there
WRITES = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink"}


def forked(arguments: list[str], folder: Path, prepare: Callable[[], object] = lambda: None) -> int:
    """The command in a copy of this process, its screen left out; returns the copy's id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        prepare()
        luthier(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os._exit(code)


def spawned(arguments: list[str], folder: Path) -> int:
    """The command as a user starts it, its screen left out; returns the process's id."""
    command = [sys.executable, "-m", "luthier.cli.main", *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL).pid


BEGIN: dict[str, Callable[[list[str], Path], int]] = {"fork": forked, "spawn": spawned, "term": forked}


def kill_at_write(number: int) -> None:
    """Makes this process kill itself when it comes to its `number`th write, counted from 1."""
    numbers = count(1)

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        reads = event == "open" and not (isinstance(arguments[1], str) and set("aw") & set(arguments[1]))
        if event in WRITES and not reads and next(numbers) == number:
            if event == "open":
                os.close(os.open(arguments[0], os.O_CREAT | os.O_TRUNC | os.O_WRONLY))
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hear)


def was_killed(process: int) -> bool:
    """Waits for its end; whether that was a signal. Ends this process where it failed by itself."""
    _, status = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 128 + signal.SIGTERM) and code > 0:
        sys.exit("the run failed by itself")
    return code != 0


def is_killed(process: int, after_seconds: float, sent: signal.Signals) -> bool:
    """Whether the signal came before its end. One that asks is heard within ten seconds."""
    time.sleep(after_seconds)
    os.kill(process, sent)
    asked = time.monotonic()
    ended = was_killed(process)
    if time.monotonic() - asked > 10 and ended:
        sys.exit(f"{sent.name} was not heard in time")
    return ended


def without_measured(value: object) -> object:
    if isinstance(value, dict):
        return {name: without_measured(inner) for name, inner in value.items() if name not in MEASURED}
    return value


def outcome(run: Path) -> dict[str, object]:
    """All that a run leaves behind, but for measured times: bytes or numbers by path, and where links point."""
    found: dict[str, object] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.name == "metrics.jsonl":
            found[name] = [without_measured(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.name in ("summary.json", "done.json", "rollout.json"):
            found[name] = without_measured(json.loads(path.read_text()))
        else:
            found[name] = path.read_bytes() if path.is_file() and path.name not in OF_ITS_DAY else "there"
    return found


def compare(expected: dict[str, object], folder: Path, what: str) -> None:
    """Ends the process where the run in the folder is another one."""
    found = outcome(folder / "run")
    differing = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if differing:
        sys.exit(f"{what}: {', '.join(differing)} differ from the run that was left alone")


def phase(run: Path) -> str:
    """How far a run had come when it was killed."""
    marks = {
        "report": "01-sft/done.json",
        "model": "01-sft/summary.json",
        "second stage": "00-pretrain/done.json",
        "hand-over": "00-pretrain/summary.json",
    }
    return next((name for name, mark in marks.items() if (run / mark).exists()), "first stage")


def moments(start: float, end: float, number: int, seed: int) -> list[float]:
    """One moment in each of `number` equal parts, shuffled."""
    draw = random.Random(seed)
    drawn = [start + (end - start) * (part + draw.random()) / number for part in range(number)]
    draw.shuffle(drawn)
    return drawn


def fresh(parent: Path, name: str) -> Path:
    """A new folder for a run."""
    folder = parent / name
    folder.mkdir()
    return folder


def kill_in_time(recipe: Path, how: str, number: int, seed: int) -> Counter[str]:
    """Kills at random moments; returns how many fell into each phase."""
    run, begin, whole = ["run", str(recipe)], BEGIN[how], fresh(recipe.parent, "whole")
    times = []
    for arguments in (
        ["run", "--schema"],
        ["run", "--schema"],
        run,
    ):  # a schema costs the imports of a run, at first more
        started = time.perf_counter()
        was_killed(begin(arguments, whole))
        times.append(time.perf_counter() - started)
    expected, phases, runs = outcome(whole / "run"), Counter[str](), count()
    folder = fresh(recipe.parent, f"killed-{next(runs)}")
    for moment in moments(times[1], times[2], number, seed):
        while True:
            is_whole = not (folder / "run").exists()
            if is_killed(begin(run, folder), moment, signal.SIGTERM if how == "term" else signal.SIGKILL):
                break
            compare(expected, folder, folder.name)
            folder = fresh(recipe.parent, f"killed-{next(runs)}")
            if is_whole:  # even a whole run is over by then: the machine is quicker than it was
                moment = times[1] + 0.8 * (moment - times[1])
        phases[phase(folder / "run")] += 1
    was_killed(begin(run, folder))
    compare(expected, folder, folder.name)
    return phases


def kill_at_writes(recipe: Path, stride: int, start: int) -> Counter[str]:
    """Kills a fresh run at every `stride`th write; returns how many kills fell into each phase."""
    run, whole, phases = ["run", str(recipe)], fresh(recipe.parent, "whole"), Counter[str]()
    was_killed(forked(run, whole))
    expected = outcome(whole / "run")
    for write in count(start, stride):
        folder = fresh(recipe.parent, f"killed-{write}")
        if not was_killed(forked(run, folder, lambda write=write: kill_at_write(write))):
            return phases
        phases[phase(folder / "run")] += 1
        was_killed(forked(run, folder))
        compare(expected, folder, f"killed at write {write}")
    raise AssertionError("the numbers never end")


def main(recipe: Path, how: str, number: int, seed: int) -> None:
    torch.set_num_threads(1)
    by_write = how == "writes"
    print(json.dumps(kill_at_writes(recipe, number, seed) if by_write else kill_in_time(recipe, how, number, seed)))


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
