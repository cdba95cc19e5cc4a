"""The metrics file holds each step once, whatever ended the runs that wrote it."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.training.callbacks import MetricsFile, read_metrics


def write(path: Path, first: int, last: int, *, told: float = 0.0) -> None:
    """A run that goes on after step `first` and ends after step `last`."""
    file = MetricsFile(path)
    file.on_start(first, 10)
    for step in range(first + 1, last + 1):
        file.on_metrics({"step": step, "loss": told})
    file.on_end()


def test_each_step_is_a_json_object_on_a_line(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    write(path, 0, 3, told=0.5)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == read_metrics(path) == [{"step": step, "loss": 0.5} for step in (1, 2, 3)]


def test_a_run_that_goes_on_drops_the_steps_that_it_does_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 5, told=1.0)
    write(path, 3, 6, told=2.0)
    assert [(m["step"], m["loss"]) for m in read_metrics(path)] == [
        *((i, 1.0) for i in (1, 2, 3)),
        (4, 2),
        (5, 2),
        (6, 2),
    ]


def test_a_run_from_the_beginning_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 5)
    write(path, 0, 1)
    assert [m["step"] for m in read_metrics(path)] == [1]


@given(kept=st.integers(0, 200))
def test_a_file_cut_at_any_byte_gives_its_whole_lines(tmp_path_factory: pytest.TempPathFactory, kept: int) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    write(path, 0, 6)
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    assert [m["step"] for m in read_metrics(path)] == list(range(1, whole[:kept].count(b"\n") + 1))


def test_no_file_means_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_lines_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.on_start(0, 10)
    file.on_metrics({"step": 1})
    assert read_metrics(file.path) == [{"step": 1}]
    file.on_end()


def test_numbers_that_are_not_finite_are_null_and_the_line_is_strict_json(tmp_path: Path) -> None:
    """NaN and Infinity are no JSON: a browser or jq would refuse the file."""
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 1, told=float("nan"))
    write(path, 1, 2, told=float("inf"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": None}, {"step": 2, "loss": None}]
    assert all(math.isnan(line["loss"]) for line in read_metrics(path))
