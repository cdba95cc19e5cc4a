"""What a run's work costs in energy, where the machine tells: joules of its processors and of the GPUs in use.

Linux counts what processor packages and memory take (RAPL, under /sys/class/powercap), NVIDIA's driver what a GPU takes
(NVML). Both count everything that runs there, not this process alone. Linux lets only root read RAPL on most machines;
what cannot be read is left out, and where nothing can be, nothing is said.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Counter", "EnergyMeter", "gpu_counters", "joules_between", "rapl_counters"]

_POWERCAP = Path("/sys/class/powercap")
_NVML = "libnvidia-ml.so.1"


@dataclass(frozen=True, slots=True)
class Counter:
    """One part of the machine. read: its joules so far, which begin again at 0 after `range_joules`, if that is not 0.

    `read` raises OSError or ValueError where it cannot be read any more.
    """

    name: str
    read: Callable[[], float]
    range_joules: float = 0.0


def rapl_counters(root: Path = _POWERCAP) -> list[Counter]:
    """Of processor packages, and of memory that is not counted with them; none where they cannot be read.

    A package (`intel-rapl:0`; AMD's has that name too) contains its cores, so of its parts (`intel-rapl:0:1`) only
    memory is added. The whole platform (psys) contains all of them and is left out.
    """
    counters = []
    for zone in sorted(root.glob("intel-rapl:*")):
        with suppress(OSError, ValueError):
            name, is_part = (zone / "name").read_text().strip(), zone.name.count(":") > 1
            if name == "dram" if is_part else name != "psys":
                counter = Counter(f"{zone.name} {name}", _microjoules(zone / "energy_uj"), _range(zone))
                counter.read()
                counters.append(counter)
    return counters


def gpu_counters(device: torch.device, library: str = _NVML) -> list[Counter]:
    """Of the GPU that the device is; none for a CPU, without NVIDIA's library, or for a GPU that does not count."""
    if device.type != "cuda":
        return []
    try:
        nvml = ctypes.CDLL(library)
    except OSError:
        return []
    identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    handle = ctypes.c_void_p()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(identity, ctypes.byref(handle)):
        return []

    def read() -> float:
        millijoules = ctypes.c_ulonglong()
        if nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
            raise OSError("NVML does not tell the energy")
        return millijoules.value / 1e3

    counter = Counter("gpu", read)
    try:
        read()
    except OSError:
        return []
    return [counter]


def joules_between(before: float, after: float, range_joules: float) -> float:
    """after - before, and the range more where the counter began again in between."""
    return after - before + (range_joules if after < before else 0.0)


class EnergyMeter:
    """Joules from one call to the next, over all counters. One that cannot be read any more silences the meter, so that
    no sum is of parts of the machine only.
    """

    def __init__(self, counters: Sequence[Counter]) -> None:
        self.counters = list(counters)
        self.last = list(self._values())

    def spent(self) -> dict[str, float]:
        """`energy_joules` since the last call or the beginning; empty where nothing is counted."""
        before, self.last = self.last, list(self._values())
        if not self.counters:
            return {}
        readings = zip(self.counters, before, self.last, strict=True)
        return {"energy_joules": sum(joules_between(old, new, counter.range_joules) for counter, old, new in readings)}

    def _values(self) -> Iterator[float]:
        try:
            yield from [counter.read() for counter in self.counters]
        except (OSError, ValueError):
            self.counters = []


def _microjoules(path: Path) -> Callable[[], float]:
    return lambda: int(path.read_text()) / 1e6


def _range(zone: Path) -> float:
    return int((zone / "max_energy_range_uj").read_text()) / 1e6
