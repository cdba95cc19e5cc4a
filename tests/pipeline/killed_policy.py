"""Runs a recipe of a policy stage, then kills it at its writes, and compares; used by `test_policy_resume`.

Arguments: the recipe, whose output is `run`; a number; a start. Fresh runs are killed just before they open for
writing, make, rename or remove a file, at every `number`th such event from the `start`th on, and run again. Ends with 1
and says what differs where that leaves anything else than the run that was left alone, but for times. Prints how many
kills found a rollout in the making, and how many met other work.
"""

import json
import sys
from collections import Counter
from itertools import count
from pathlib import Path

import torch
from killed_recipe import forked, fresh, kill_at_write, outcome, was_killed


def phase(run: Path) -> str:
    """Whether it was killed while a rollout was sampled, scored or written."""
    made = [folder for folder in run.glob("*/rollouts/*/") if not (folder / "rollout.json").exists()]
    return "rollout" if made else "learning" if list(run.glob("*/rollouts/*/")) else "before"


def main(recipe: Path, stride: int, start: int) -> None:
    torch.set_num_threads(1)
    run, whole, phases = ["run", str(recipe)], fresh(recipe.parent, "whole"), Counter[str]()
    was_killed(forked(run, whole))
    expected = outcome(whole / "run")
    for write in count(start, stride):
        folder = fresh(recipe.parent, f"killed-{write}")
        if not was_killed(forked(run, folder, lambda write=write: kill_at_write(write))):
            break
        phases[phase(folder / "run")] += 1
        was_killed(forked(run, folder))
        found = outcome(folder / "run")
        if differing := sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name)):
            sys.exit(f"killed at write {write}: {', '.join(differing)} differ from the run that was left alone")
    print(json.dumps(phases))


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), int(sys.argv[2]), int(sys.argv[3]))
