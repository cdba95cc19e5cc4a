"""Runs a recipe on disks that are too small for it, then with room, and compares; used by `test_full_disk`.

Arguments: the recipe, whose output is `run`; what is too small; sizes in bytes. `file` lets no file grow beyond the
size, as a quota may. `disk` is a file system of that size in memory, which takes the right to mount one; it grows
before the second run. Ends with 1 and says what is wrong where the first run ends otherwise than with one sentence that
names what cannot be written, or leaves anything half-written, or the second does not end as one with room from the
start. Prints the sentence for each size that was too small.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from killed_recipe import compare, forked, fresh, outcome

PLENTY = 2**30


def limit(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def mount(folder: Path, size: int, *, again: bool = False) -> None:
    options = f"{'remount,' if again else ''}size={size}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "luthier-test", str(folder)], check=True)


def ended(recipe: Path, folder: Path, prepare: Callable[[], object] = lambda: None) -> tuple[int, list[str]]:
    """The exit code of the command, and the lines that it says."""
    said = folder.with_suffix(".said")

    def listen() -> None:
        os.dup2(os.open(said, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 2)
        prepare()

    _, status = os.waitpid(forked(["run", str(recipe)], folder, listen), 0)
    return os.waitstatus_to_exitcode(status), said.read_text().splitlines()


def refused(code: int, lines: list[str], folder: Path) -> str:
    """The sentence that a run without room has ended with."""
    sentence = lines[-1] if lines else ""
    wrong = code != 1 or "Traceback" in "".join(lines) or not sentence.startswith("luthier: ")
    named = "run/" in sentence or ": run: " in sentence  # a file in the folder, or the folder
    if wrong or not named or "make room" not in sentence:
        sys.exit(f"{folder.name} ended with {code} and these lines:\n" + "\n".join(lines))
    if half := [str(path) for path in folder.rglob(".*.part*")]:
        sys.exit(f"{folder.name} leaves {', '.join(half)}")
    return sentence


def main(recipe: Path, what: str, sizes: list[int]) -> None:
    torch.set_num_threads(1)
    whole, sentences = fresh(recipe.parent, "whole"), {}
    ended(recipe, whole)
    expected = outcome(whole / "run")
    for size in sizes:
        folder = fresh(recipe.parent, f"{what}-{size}")
        if what == "disk":
            mount(folder, size)
        code, lines = ended(recipe, folder, limit(size) if what == "file" else lambda: None)
        if code:
            sentences[size] = refused(code, lines, folder).replace(str(folder), "")
            if what == "disk":
                mount(folder, PLENTY, again=True)
            code, lines = ended(recipe, folder)
        if code:
            sys.exit(f"{folder.name} does not go on:\n" + "\n".join(lines))
        compare(expected, folder, folder.name)
        if what == "disk":
            subprocess.run(["umount", str(folder)], check=True)
    print(json.dumps(sentences))


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), sys.argv[2], [int(size) for size in sys.argv[3:]])
