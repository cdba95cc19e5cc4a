"""A disk that is too small is spoken of before anything is written."""

import logging
from pathlib import Path

import pytest

from luthier.files import free_bytes
from luthier.pipeline.disk import checkpoint_bytes, state_bytes, warn_of_little_room
from luthier.recipe.training import Training
from luthier.training.footprint import Footprint


def settings(keep_last: int, optimizer: str = "adamw") -> Training:
    return Training.model_validate({"data": "rows.jsonl", "keep_last": keep_last, "optimizer": optimizer})


def test_checkpoints_are_the_newest_the_best_and_the_one_in_the_making() -> None:
    assert checkpoint_bytes(settings(3), 12 * 10**6) == 5 * 12 * 10**6


def test_a_checkpoint_is_what_is_trained_its_moments_and_averages_where_there_are_any() -> None:
    footprint = Footprint(weights=9, masters=4, gradients=4, optimizer=8, activations=99)
    assert [state_bytes(settings(1, word), footprint) for word in ("adamw", "schedule_free")] == [12, 16]


def test_room_that_suffices_is_not_spoken_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_little_room(settings(1), 2, tmp_path, tmp_path / "run" / "00-sft")
    assert not caplog.records


def test_too_little_room_is_said_with_what_to_lower(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Twice of all that is free, in one checkpoint; once that is there, only what is still to come counts."""
    base, stage = tmp_path / "base", tmp_path / "run" / "00-sft"
    base.mkdir()
    (base / "model.safetensors").write_bytes(bytes(5 * 10**6))
    warn_of_little_room(settings(1), 2 * free_bytes(tmp_path), base, stage)
    (record,) = caplog.records
    assert "run/00-sft: up to " in record.getMessage()
    assert "5.00 MB of a model" in record.getMessage()
    assert "lower keep_last" in record.getMessage()
    (stage / "checkpoints" / "step-00000001").mkdir(parents=True)
    with (stage / "checkpoints" / "step-00000001" / "state.safetensors").open("wb") as sparse:
        sparse.truncate(3 * free_bytes(tmp_path))
    warn_of_little_room(settings(1), free_bytes(tmp_path), base, stage)
    assert len(caplog.records) == 1
