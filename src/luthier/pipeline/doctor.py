"""What would spoil a run hours later, looked for before it begins: on the machine, in a recipe, in a file of data.

Each finding is one sentence of what there is, and one of what to change. What is looked at is told apart from how it is
judged, so that judgements hold for machines that are not at hand.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from luthier.data.reading import read_examples
from luthier.errors import LuthierError
from luthier.files import existing, free_bytes
from luthier.models.cache import cache_folder
from luthier.models.sources import resolve
from luthier.pipeline.disk import checkpoint_bytes, model_bytes
from luthier.pipeline.plan import plan_stage
from luthier.recipe.document import Recipe, load_recipe
from luthier.training.memory import available_bytes

__all__ = ["Finding", "Machine", "check_data", "check_machine", "check_recipe"]

_LEAST_MEMORY, _LEAST_DISK = 4 * 10**9, 5 * 10**9  # bytes that a small model's training and its files take
_OLDEST_TORCH = (2, 11)
_FAST_BFLOAT16 = {"amx_bf16", "avx512_bf16", "bf16"}  # as Linux calls them on x86 and ARM


@dataclass(frozen=True, slots=True)
class Finding:
    """level: good, a warning, or a problem that a run would end with."""

    level: Literal["good", "warning", "problem"]
    what: str
    change: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is. cores: that this process may use. flags: of the processor, None where the system does not tell.
    gpus: that PyTorch sees; has_driver: whether there is one at all. Sizes in bytes.
    """

    torch: str
    cores: int
    threads: int
    flags: frozenset[str] | None
    memory: int
    disk: int
    gpus: tuple[str, ...]
    has_driver: bool

    @classmethod
    def here(cls) -> "Machine":
        """This one, with the current folder's disk."""
        return cls(
            torch=torch.__version__,
            cores=_cores(),
            threads=torch.get_num_threads(),
            flags=_flags(),
            memory=available_bytes(torch.device("cpu")),
            disk=free_bytes(Path.cwd()),
            gpus=tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())),
            has_driver=shutil.which("nvidia-smi") is not None,
        )


def check_machine(machine: Machine) -> list[Finding]:
    """What is good or bad about it."""
    return [*_torch(machine), *_threads(machine), *_bfloat16(machine), *_room(machine), *_cache()]


def _torch(machine: Machine) -> Iterator[Finding]:
    numbers = tuple(int(part) for part in machine.torch.split("+")[0].split(".")[:2])
    if numbers < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        yield Finding("problem", f"torch {machine.torch} is too old", f"install torch {oldest} or newer")
    elif machine.has_driver and not machine.gpus:
        change = "install a build of torch for its CUDA, or see that the driver runs (nvidia-smi)"
        yield Finding("problem", f"there is a GPU, and torch {machine.torch} does not see it", change)
    else:
        where = ", ".join(machine.gpus) or "no GPU, so everything runs on the CPU"
        yield Finding("good", f"torch {machine.torch}; {where}")


def _threads(machine: Machine) -> Iterator[Finding]:
    what = f"{machine.threads} threads on {machine.cores} cores"
    if machine.threads > machine.cores:
        yield Finding("warning", f"{what}: they wait for one another", f"set OMP_NUM_THREADS={machine.cores}")
    elif machine.threads < machine.cores and not machine.gpus:
        yield Finding("warning", f"{what}: the others are idle", "unset OMP_NUM_THREADS, or raise it")
    else:
        yield Finding("good", what)


def _bfloat16(machine: Machine) -> Iterator[Finding]:
    if machine.gpus or machine.flags is None:
        return
    if machine.flags & _FAST_BFLOAT16:
        yield Finding("good", "the processor has bfloat16 products")
    else:
        change = "set dtype: fp32, which takes more memory and less time"
        yield Finding("warning", "the processor has no bfloat16 products, so dtype: bf16 is slow", change)


def _room(machine: Machine) -> Iterator[Finding]:
    memory = f"{machine.memory / 1e9:.1f} GB of memory are free"
    change = "end other programs, or raise the container's limit"
    yield Finding("good", memory) if machine.memory >= _LEAST_MEMORY else Finding("warning", f"only {memory}", change)
    disk = f"{machine.disk / 1e9:.1f} GB of disk are free here"
    change = "make room, or choose an output on another disk"
    yield Finding("good", disk) if machine.disk >= _LEAST_DISK else Finding("warning", f"only {disk}", change)


def _cache() -> Iterator[Finding]:
    folder = cache_folder(os.environ)
    place = existing(folder)
    if place.is_dir() and os.access(place, os.W_OK):
        yield Finding("good", f"models are kept in {folder}")
    else:
        change = "set LUTHIER_CACHE to a folder that can be written"
        yield Finding("problem", f"{folder} cannot be written, and models are kept there", change)


def check_recipe(path: Path) -> list[Finding]:
    """Whether it can be read, its data fits, each stage fits into memory, and what it writes onto the disk."""
    try:
        recipe = load_recipe(path)
    except LuthierError as error:
        return [Finding("problem", str(error))]
    found = [Finding("good", f"{path}: {len(recipe.stages)} stages on {recipe.model}")]
    written = 0
    for index, stage in enumerate(recipe.stages):
        name = f"{index:02d}-{stage.word}"
        try:
            plan, change = plan_stage(stage.word, stage.settings, recipe.model)
        except LuthierError as error:
            found.append(Finding("problem", f"{name}: {error}"))
            continue
        fits = f"{name}: takes {plan.peak_bytes / 1e9:.1f} GB of {plan.available_bytes / 1e9:.1f}"
        found.append(Finding("good", fits) if plan.fits else Finding("problem", f"{name}: {plan.sentence(change)}"))
        written += checkpoint_bytes(stage.settings, plan.state_bytes)
    return [*found, *_disk(recipe, written)]


def _disk(recipe: Recipe, written: int) -> Iterator[Finding]:
    """written: by checkpoints, in bytes. Each stage leaves a model besides."""
    try:
        folder = resolve(recipe.model).folder
    except LuthierError:  # which its stages have said
        return
    needed, free = written + model_bytes(folder) * len(recipe.stages), free_bytes(Path(recipe.output))
    what = f"{recipe.output}: takes about {needed / 1e9:.1f} GB of disk, and {free / 1e9:.1f} are free"
    change = "make room, lower keep_last, or choose an output on another disk"
    yield Finding("good", what) if needed < free else Finding("problem", what, change)


def check_data(path: Path) -> list[Finding]:
    """Whether every row of a file can be read, and as what."""
    try:
        reading = read_examples(str(path), task=None, on_error="skip")
    except LuthierError as error:
        return [Finding("problem", str(error))]
    kinds = sorted({type(example).__name__.lower() for _, example in reading.examples})
    what = f"{path}: {len(reading.examples):,} of {reading.num_rows:,} rows are good ({', '.join(kinds) or 'none'})"
    if not reading.bad:
        return [Finding("good", what)]
    first = reading.bad[0]
    change = f"mend them (`luthier data validate {path}` lists all), or set on_error: skip"
    return [Finding("problem", f"{what}; the first bad one is {first.origin}: {first.reason}", change)]


def _cores() -> int:
    """That this process may run on, within its control group's share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = Path("/sys/fs/cgroup/cpu.max")
    quota, _, period = share.read_text().strip().partition(" ") if share.exists() else ("max", "", "")
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def _flags() -> frozenset[str] | None:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = next((line for line in lines if line.lower().startswith(("flags", "features"))), None)
    return None if named is None else frozenset(named.partition(":")[2].split())
