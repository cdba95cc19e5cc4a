"""manifest.json: what a run was made of and what came of it, so that a result can be traced, and had once more.

It holds the whole recipe, versions, hardware, the state of the user's repository, hashes of data, base model and
artifacts, and how each stage's steps were cut, also once memory had run out; and nothing that differs from run to run
otherwise, as times do, which stand in each stage's summary.json.
"""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from luthier.data.sources import find_files
from luthier.files import file_hash, write_whole
from luthier.pipeline.reward_hashes import reward_hashes
from luthier.pipeline.sealed import read_sealed
from luthier.recipe.document import Recipe, dump_recipe
from luthier.recipe.policy import OnPolicy
from luthier.recipe.rewards import parts_of
from luthier.recipe.training import Pretrain, Training

__all__ = ["PLAN", "data_hashes", "hardware", "kept_plan", "rewards_of", "versions", "write_manifest"]

PLAN = "plan.json"

_PACKAGES = ("luthier", "torch", "transformers", "tokenizers", "safetensors", "numpy")
_SECONDS_FOR_GIT = 10


def write_manifest(
    folder: Path,
    recipe: Recipe,
    *,
    base: Mapping[str, str],
    artifacts: Mapping[str, Any],
    shortages: Mapping[str, int],
) -> None:
    """Writes it into the run's folder, whose stages are done. shortages: by stage, the bound on its micro-batches once
    memory had run out while it learned or evaluated, where it did.
    """
    names = [f"{index:02d}-{stage.word}" for index, stage in enumerate(recipe.stages)]
    manifest = {
        "recipe": dump_recipe(recipe),
        "versions": versions(),
        "hardware": hardware(),
        "repository": _repository(),
        "seeds": {name: stage.settings.seed for name, stage in zip(names, recipe.stages, strict=True)},
        "base_model": dict(base),
        "data": {name: digest for stage in recipe.stages for name, digest in data_hashes(stage.settings).items()},
        "artifacts": dict(artifacts),
        "micro_batch_tokens": {name: _micro_batch_tokens(folder / name / PLAN) for name in names},
        "shortages": dict(shortages),
    }
    write_whole(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def kept_plan(path: Path) -> dict[str, Any]:
    """A stage's plan.json. Raises CheckpointError where it is damaged."""
    mend = "copy it back, or delete it: steps are then cut anew, and sums may round otherwise than before"
    return read_sealed(path, mend=mend)


def _micro_batch_tokens(plan: Path) -> Any:
    """As the stage's memory plan decided; None for a stage without a plan of its own."""
    return kept_plan(plan)["micro_batch_tokens"] if plan.exists() else None


def versions() -> dict[str, str]:
    """Of what decides numbers: packages, and Python."""
    return {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()}


def hardware() -> dict[str, Any]:
    """What decides roundings: the kind of machine, its cores and GPUs, and the threads in use."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpus": gpus}


def _repository() -> dict[str, Any] | None:
    """The commit that the current folder's git repository is at, and whether files differ from it; None without one."""
    commit = _git("rev-parse", "HEAD")
    return {"commit": commit, "changed": bool(_git("status", "--porcelain"))} if commit else None


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=_SECONDS_FOR_GIT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def data_hashes(settings: Training) -> dict[str, str]:
    """SHA-256 of every file that the stage reads its data from, and of what its rewards are made of. Raises DataError
    where a name matches no file.
    """
    mixed = settings.mix if isinstance(settings, Pretrain) else ()
    guard = settings.forgetting
    named = [settings.data, settings.eval_data, *((guard.text, guard.questions) if guard else ()), *mixed]
    files = {file for names in named if names is not None for file in find_files(names)}
    return {name: file_hash(Path(name)) for name in sorted(files)} | rewards_of(settings)


def rewards_of(settings: Training) -> dict[str, str]:
    """What the stage's rewards are made of, if it has any, as `reward_hashes` says."""
    parts = parts_of(settings.reward) if isinstance(settings, OnPolicy) else ()
    return {name: digest for part in parts for name, digest in reward_hashes(part).items()}
