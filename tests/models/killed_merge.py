"""Merges in processes that get signal 9 at random moments, and looks at what each has left.

Run by test_merge.py as `killed_merge.py BASE ADAPTER FOLDER KILLS`. Processes are forked, so that each costs no import.
Ends with 1 where a folder that counts as a model is not, byte for byte, what an undisturbed merge writes.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from luthier.errors import LuthierError
from luthier.models.load import load
from luthier.models.merge import merge_into
from luthier.models.sources import resolve


def is_killed(base: Path, adapter: Path, place: Path, after_seconds: float) -> bool:
    """Merges in a process of its own; whether the signal came before its end."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            merge_into(resolve(str(base)), adapter, place)
            code = 0
        finally:
            os._exit(code)
    time.sleep(after_seconds)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit("the merge failed by itself")
    return os.WIFSIGNALED(status)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def is_model(folder: Path) -> bool:
    try:
        load(str(folder))
    except LuthierError:
        return False
    return True


def main(base: Path, adapter: Path, folder: Path, num_kills: int) -> None:
    torch.set_num_threads(1)
    expected, draw, killed = None, random.Random(0), 0
    for _ in range(2):  # the second is as warm as those to come
        started = time.perf_counter()
        expected = content(merge_into(resolve(str(base)), adapter, folder / "whole").folder)
        whole_seconds = time.perf_counter() - started
    while killed < num_kills:
        place = folder / f"killed-{killed:03d}" / "model"
        killed += is_killed(base, adapter, place, draw.uniform(0, whole_seconds))
        for left in place.parent.iterdir() if place.parent.exists() else ():
            if (left == place or is_model(left)) and content(left) != expected:
                sys.exit(f"{left} counts as a model and is not what an undisturbed merge writes")
    print(f"killed {killed} times")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
