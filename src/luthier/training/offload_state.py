"""Where masters and moments lie that are not to be beside the model.

In the host's memory (Ren et al. 2021, ZeRO-Offload) they are masters on another device: gradients are collected into
them and the step runs there. On the disk they are files that the step reads and writes as memory; the system keeps of
them what there is room for. A file loses its name as soon as it is mapped, so nothing is left behind after a kill.
"""

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from luthier.errors import RecipeError, TrainingError
from luthier.files import free_bytes
from luthier.shortage import release_freed_memory
from luthier.training.footprint import Footprint
from luthier.training.memory import available_bytes
from luthier.training.precision import Keep

__all__ = ["Place", "beside_model", "in_file", "keep_in", "room_in"]

Place = Literal["disk", "memory"] | None

_SMALLEST_IN_FILE = 4096  # elements; a file for less than a few pages saves nothing


def keep_in(place: Place, folder: Path, device: torch.device) -> Keep | None:
    """How masters and moments of a network on the device get to their place; None for where they are made anyway.

    folder: of the files, which is made if need be. Raises RecipeError for a place that is no other.
    """
    if place == "disk":
        return partial(in_file, folder=folder)
    if place == "memory" and device.type == "cpu":
        raise RecipeError("offload_optimizer: on a CPU all is in the machine's memory already; choose disk, or drop it")
    return _in_memory if place == "memory" else None


def _in_memory(tensor: Tensor) -> Tensor:
    return tensor.to("cpu")


def in_file(tensor: Tensor, *, folder: Path) -> Tensor:
    """The same values in the host's memory, as a mapped file in the folder. Small tensors, and those that do not lie in
    one piece, stay in memory proper. Raises TrainingError where there is no room.
    """
    tensor = tensor.to("cpu")
    if tensor.numel() < _SMALLEST_IN_FILE or not tensor.is_contiguous():
        return tensor
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="optimizer-") as file:
            # written before it is mapped: a mapped file that finds no room would kill the process
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)
            file.flush()
            mapped = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    except OSError as error:
        raise TrainingError(
            f"offload_optimizer: {folder} cannot take the optimizer's moments ({error.strerror}); make room, or choose "
            "another output"
        ) from error
    release_freed_memory()  # of tensors that came here before; glibc would not use it again for others as large
    return mapped.view(tensor.shape)


def beside_model(footprint: Footprint, place: Place, device: torch.device) -> tuple[Footprint, int]:
    """The footprint of a step without what lies elsewhere, and the bytes of that.

    Pages of mapped files are resident as long as there is room for them and are given up where there is none, so they
    do not count as memory.
    """
    if place is None or (place == "memory" and device.type == "cpu"):
        return footprint, 0
    if device.type == "cpu":
        return replace(footprint, masters=0, optimizer=0), footprint.masters + footprint.optimizer
    elsewhere = 2 * footprint.gradients + footprint.optimizer  # a master is as large as its gradient
    return replace(footprint, masters=0, gradients=0, optimizer=0), elsewhere


def room_in(place: Place, folder: Path) -> int:
    """Bytes that masters and moments may take there. folder: need not be there yet."""
    if place == "disk":
        return free_bytes(folder)
    return available_bytes(torch.device("cpu"))
