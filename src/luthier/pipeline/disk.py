"""What a stage writes onto the disk, and a word beforehand where that is more than there is room for.

Checkpoints hold what is trained and what its optimizer keeps of it, as the memory plan counts them; a merged model is
as large as the one that it is made from. Rollouts and logs are small beside them and are left out.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from luthier.files import existing, in_words
from luthier.recipe.training import Training

__all__ = ["checkpoint_bytes", "free_bytes", "model_bytes", "warn_of_little_room"]

logger = logging.getLogger(__name__)


def checkpoint_bytes(settings: Training, parts: Mapping[str, int]) -> int:
    """Of all checkpoints that there are at the same time: the newest, the best, and one that is being written. parts:
    of the memory plan.
    """
    one = parts["gradients"] + parts["optimizer"]  # what is trained is as large as its gradients
    return (settings.keep_last + 2) * one


def model_bytes(folder: Path) -> int:
    """Of a model's weights; 0 where there are none."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def free_bytes(folder: Path) -> int:
    """On the disk where this folder is, or will be."""
    return shutil.disk_usage(existing(folder)).free


def warn_of_little_room(settings: Training, parts: Mapping[str, int], base: Path, folder: Path) -> None:
    """Says what a stage in `folder` will write, on a model in `base`, where less is free. What is there already of its
    checkpoints counts as written.
    """
    there = sum(file.stat().st_size for file in folder.glob("checkpoints/step-*/*"))
    checkpoints, model = checkpoint_bytes(settings, parts), model_bytes(base)
    needed, free = max(0, checkpoints - there) + model, free_bytes(folder)
    if needed > free:
        logger.warning(
            "%s: up to %s of checkpoints and %s of a model are to be written, and %s are free; make room, lower "
            "keep_last, or choose an output on another disk",
            folder,
            in_words(checkpoints),
            in_words(model),
            in_words(free),
        )
