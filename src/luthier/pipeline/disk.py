"""What a stage writes onto the disk, and a word beforehand where that is more than there is room for.

Checkpoints hold what is trained and what its optimizer keeps of it, as the memory plan counts them; a merged model is
as large as the one that it is made from. Rollouts and logs are small beside them and are left out.
"""

import logging
from pathlib import Path

from luthier.files import free_bytes, in_words
from luthier.recipe.optimizers import ScheduleFree
from luthier.recipe.training import Training
from luthier.training.footprint import Footprint

__all__ = ["checkpoint_bytes", "model_bytes", "state_bytes", "warn_of_little_room"]

logger = logging.getLogger(__name__)


def state_bytes(settings: Training, footprint: Footprint) -> int:
    """Of a checkpoint: what is trained, which is as large as its gradients, and what the optimizer keeps of it; where
    it averages weights, these besides.
    """
    averages = footprint.gradients if isinstance(settings.optimizer, ScheduleFree) else 0
    return footprint.gradients + footprint.optimizer + averages


def checkpoint_bytes(settings: Training, one: int) -> int:
    """Of all checkpoints that there are at the same time: the newest, the best, and one that is being written."""
    return (settings.keep_last + 2) * one


def model_bytes(folder: Path) -> int:
    """Of a model's weights; 0 where there are none."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def warn_of_little_room(settings: Training, one: int, base: Path, folder: Path) -> None:
    """Says what a stage in `folder` will write, on a model in `base`, where less is free. What is there already of its
    checkpoints counts as written. one: the bytes of a checkpoint.
    """
    there = sum(file.stat().st_size for file in folder.glob("checkpoints/step-*/*"))
    checkpoints, model = checkpoint_bytes(settings, one), model_bytes(base)
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
