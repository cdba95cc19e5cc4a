"""Energy from a made tree like Linux's: what is added up, what is left out, and counters that begin again."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luthier.training.energy import Counter, EnergyMeter, gpu_counters, joules_between, rapl_counters
from luthier.training.loop import fit
from luthier.training.run import Run

RANGE = 262_143_328_850  # microjoules, as Intel's processors have it


def zone(root: Path, place: str, name: str, microjoules: int) -> Path:
    """A zone of powercap; a part of another where the place has two numbers."""
    folder = root / place
    folder.mkdir()
    for file, text in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", RANGE)):
        (folder / file).write_text(f"{text}\n")
    return folder


@pytest.fixture
def sys_tree(tmp_path: Path) -> Path:
    """Two packages, of which one has parts, the platform, and the same package by another door."""
    for place, name, microjoules in (
        ("intel-rapl:0", "package-0", 5_000_000),
        ("intel-rapl:0:0", "core", 3_000_000),
        ("intel-rapl:0:1", "dram", 1_000_000),
        ("intel-rapl:1", "package-1", 7_000_000),
        ("intel-rapl:2", "psys", 90_000_000),
        ("intel-rapl-mmio:0", "package-0", 5_000_000),
    ):
        zone(tmp_path, place, name, microjoules)
    (tmp_path / "intel-rapl").mkdir()
    return tmp_path


def test_packages_and_memory_are_counted_once(sys_tree: Path) -> None:
    counters = rapl_counters(sys_tree)
    assert [counter.name for counter in counters] == [
        "intel-rapl:0 package-0",
        "intel-rapl:0:1 dram",
        "intel-rapl:1 package-1",
    ]
    assert [counter.read() for counter in counters] == [5, 1, 7]


def test_the_meter_tells_what_was_spent_since_the_last_time(sys_tree: Path) -> None:
    meter = EnergyMeter(rapl_counters(sys_tree))
    (sys_tree / "intel-rapl:0" / "energy_uj").write_text("8500000\n")
    (sys_tree / "intel-rapl:1" / "energy_uj").write_text("7250000\n")
    assert meter.spent() == {"energy_joules": 3.75}
    assert meter.spent() == {"energy_joules": 0.0}


def test_a_counter_that_began_again_goes_on(tmp_path: Path) -> None:
    """From 1 J below the range's end to 2 J after it: 3 J."""
    folder = zone(tmp_path, "intel-rapl:0", "package-0", RANGE - 1_000_000)
    meter = EnergyMeter(rapl_counters(tmp_path))
    (folder / "energy_uj").write_text("2000000\n")
    assert meter.spent()["energy_joules"] == pytest.approx(3.0)


@given(start=st.floats(0, 99), spent=st.floats(0, 99))
def test_what_is_spent_does_not_depend_on_where_the_counter_stands(start: float, spent: float) -> None:
    assert joules_between(start, (start + spent) % 100, 100) == pytest.approx(spent, abs=1e-9)


@pytest.mark.parametrize("gone", ["energy_uj", "max_energy_range_uj", "name"])
def test_what_cannot_be_read_is_left_out(sys_tree: Path, gone: str) -> None:
    (sys_tree / "intel-rapl:1" / gone).unlink()
    assert [counter.name for counter in rapl_counters(sys_tree)] == ["intel-rapl:0 package-0", "intel-rapl:0:1 dram"]


def test_a_machine_without_counters_tells_nothing(tmp_path: Path) -> None:
    assert EnergyMeter(rapl_counters(tmp_path / "nowhere")).spent() == {}
    assert gpu_counters(torch.device("cpu")) == []


def test_a_counter_that_falls_silent_silences_the_meter(sys_tree: Path) -> None:
    meter = EnergyMeter(rapl_counters(sys_tree))
    (sys_tree / "intel-rapl:0" / "energy_uj").unlink()
    assert meter.spent() == {}
    assert meter.spent() == {}


def test_every_line_of_a_run_tells_its_energy(run_of: Callable[..., Run], tmp_path: Path) -> None:
    """A counter that goes on by 2 J each time it is read: once at the start, then once a line."""
    readings = iter(range(0, 1000, 2))
    told: list[dict[str, float]] = []

    class Ear:
        def on_start(self, step: int, num_steps: int) -> None: ...

        def on_metrics(self, metrics: dict[str, float]) -> None:
            told.append(metrics)

        def on_end(self) -> None: ...

    run = run_of(callbacks=[Ear()], max_steps=3)
    run.energy = EnergyMeter([Counter("made", lambda: float(next(readings)))])
    fit(run)
    assert [line["energy_joules"] for line in told] == [2.0, 2.0, 2.0]
