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
from luthier.models.weights import weights_hash
from luthier.recipe.document import Recipe
from luthier.recipe.policy import OnPolicy
from luthier.recipe.rewards import AnyReward, FunctionReward, JsonReward, ModelReward, parts_of
from luthier.recipe.training import Pretrain, Training

__all__ = ["data_hashes", "reward_hashes", "write_manifest"]

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
    return {name: _sha256(Path(name)) for name in sorted(files)} | reward_hashes(settings)


def reward_hashes(settings: Training) -> dict[str, str]:
    """SHA-256 of functions' files, schemas and reward models' weights; none of what is not there, which is complained
    of where it is read.
    """
    if not isinstance(settings, OnPolicy):
        return {}
    places = [place for part in parts_of(settings.reward) if (place := _place_of(part)) is not None]
    files = {str(place): _sha256(place) for place in places if place.is_file()}
    return files | {str(place): weights_hash(place) for place in places if place.is_dir()}


def _place_of(part: AnyReward) -> Path | None:
    """The file or the folder that a reward stands in, if any."""
    match part:
        case FunctionReward():
            return Path(part.function.rpartition(":")[0])
        case JsonReward(schema_file=str(file)):
            return Path(file)
        case ModelReward():
            return Path(part.model)
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
