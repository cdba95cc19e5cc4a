"""manifest.json: what a run was made of, so that a result can be traced to versions, data and weights."""

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from luthier.data.sources import find_files
from luthier.files import write_whole
from luthier.pipeline.reward_hashes import reward_hashes
from luthier.recipe.document import Recipe
from luthier.recipe.policy import OnPolicy
from luthier.recipe.rewards import parts_of
from luthier.recipe.training import Pretrain, Training

__all__ = ["data_hashes", "rewards_of", "write_manifest"]

_PACKAGES = ("luthier", "torch", "transformers", "tokenizers", "safetensors", "numpy")


def write_manifest(folder: Path, recipe: Recipe, *, base: Mapping[str, str], artifacts: Mapping[str, Any]) -> None:
    """Writes versions, hardware, seeds, hashes of the data and of the base model, and each artifact's parent."""
    manifest = {
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "hardware": _hardware(),
        "seeds": {f"{i:02d}-{stage.word}": stage.settings.seed for i, stage in enumerate(recipe.stages)},
        "base_model": dict(base),
        "data": {name: digest for stage in recipe.stages for name, digest in data_hashes(stage.settings).items()},
        "artifacts": dict(artifacts),
    }
    write_whole(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def _hardware() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpus": gpus}


def data_hashes(settings: Training) -> dict[str, str]:
    """SHA-256 of every file that the stage reads its data from, and of what its rewards are made of. Raises DataError
    where a name matches no file.
    """
    named = [settings.data, settings.eval_data, *(settings.mix if isinstance(settings, Pretrain) else ())]
    files = {file for names in named if names is not None for file in find_files(names)}
    return {name: _sha256(Path(name)) for name in sorted(files)} | rewards_of(settings)


def rewards_of(settings: Training) -> dict[str, str]:
    """What the stage's rewards are made of, if it has any, as `reward_hashes` says."""
    parts = parts_of(settings.reward) if isinstance(settings, OnPolicy) else ()
    return {name: digest for part in parts for name, digest in reward_hashes(part).items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
