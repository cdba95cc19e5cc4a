"""A disk that is too small is spoken of before anything is written."""

import logging
from pathlib import Path

import pytest

from luthier.pipeline.disk import checkpoint_bytes, free_bytes, warn_of_little_room
from luthier.recipe.training import Training

PARTS = {"gradients": 4 * 10**6, "optimizer": 8 * 10**6}


def settings(keep_last: int) -> Training:
    return Training.model_validate({"data": "rows.jsonl", "keep_last": keep_last})


def test_checkpoints_are_the_newest_the_best_and_the_one_in_the_making() -> None:
    assert checkpoint_bytes(settings(3), PARTS) == 5 * 12 * 10**6


def test_room_that_suffices_is_not_spoken_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_little_room(settings(1), {"gradients": 1, "optimizer": 1}, tmp_path, tmp_path / "run" / "00-sft")
    assert not caplog.records


def test_too_little_room_is_said_with_what_to_lower(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Twice of all that is free, in one checkpoint; once that is there, only what is still to come counts."""
    base, stage = tmp_path / "base", tmp_path / "run" / "00-sft"
    base.mkdir()
    (base / "model.safetensors").write_bytes(bytes(5 * 10**6))
    warn_of_little_room(settings(1), {"gradients": 2 * free_bytes(tmp_path), "optimizer": 0}, base, stage)
    (record,) = caplog.records
    assert "run/00-sft: up to " in record.getMessage()
    assert "5.00 MB of a model" in record.getMessage()
    assert "lower keep_last" in record.getMessage()
    (stage / "checkpoints" / "step-00000001").mkdir(parents=True)
    with (stage / "checkpoints" / "step-00000001" / "state.safetensors").open("wb") as sparse:
        sparse.truncate(3 * free_bytes(tmp_path))
    warn_of_little_room(settings(1), {"gradients": free_bytes(tmp_path), "optimizer": 0}, base, stage)
    assert len(caplog.records) == 1
