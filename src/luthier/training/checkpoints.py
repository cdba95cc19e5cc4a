"""Checkpoints that survive a kill or a full disk at any instant.

A checkpoint is written into a folder beside, flushed to the disk, and then renamed, so a folder with a checkpoint's
name is always whole. It holds a hash of its tensors; a damaged one is passed over, with a warning, for the one before
it. `last` and `best` are links, exchanged by renaming too.
"""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.errors import CheckpointError
from luthier.training.state import Progress, TrainState

__all__ = ["Checkpoints"]

logger = logging.getLogger(__name__)

_TENSORS, _STATE = "state.safetensors", "progress.json"


class Checkpoints:
    """The checkpoints of one run, in `folder`: the newest `keep_last`, and the best besides.

    fingerprint: what a checkpoint must share with the run that goes on from it (settings, data, model).
    """

    def __init__(self, folder: Path, *, keep_last: int, fingerprint: str) -> None:
        self.folder, self.keep_last, self.fingerprint = folder, keep_last, fingerprint

    def save(self, state: TrainState, *, best: bool = False) -> Path:
        """Writes the state of a step; returns the checkpoint's folder. An existing one of the same step is replaced."""
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self.folder / f"step-{state.progress.step:08d}"
        beside = self.folder / f".{final.name}.part"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        tensors = {name: t.detach().to("cpu").contiguous() for name, t in state.tensors().items()}
        save_file(tensors, beside / _TENSORS)
        described = {"progress": state.progress.as_dict(), "fingerprint": self.fingerprint}
        described["sha256"] = _sha256(beside / _TENSORS)
        (beside / _STATE).write_text(json.dumps(described, indent=1))
        for path in (beside / _TENSORS, beside / _STATE, beside):
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)
        beside.rename(final)
        self._point("last", final)
        if best:
            self._point("best", final)
        _flush(self.folder)
        self._prune()
        return final

    def latest(self) -> Path | None:
        """The newest whole checkpoint of this run, or None. Raises CheckpointError if it belongs to another run."""
        for path in sorted(self.folder.glob("step-*"), reverse=True):
            if self._is_whole(path):
                return path
        return None

    def best(self) -> Path | None:
        """The checkpoint with the lowest evaluation loss, or None."""
        link = self.folder / "best"
        return link.resolve() if link.exists() else None

    def load(self, path: Path, state: TrainState) -> None:
        """Puts a checkpoint into the state, bit for bit. Raises CheckpointError where it does not fit."""
        described = json.loads((path / _STATE).read_text())
        tensors: dict[str, Tensor] = load_file(path / _TENSORS)
        try:
            state.restore(tensors, Progress(**described["progress"]))
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"{path}: does not fit this model ({error}); choose another output folder") from error

    def _is_whole(self, path: Path) -> bool:
        try:
            described = json.loads((path / _STATE).read_text())
            whole = described["sha256"] == _sha256(path / _TENSORS)
        except (OSError, ValueError, KeyError):
            whole = False
        if not whole:
            logger.warning("%s is damaged; going back to the checkpoint before it", path)
            return False
        if described["fingerprint"] != self.fingerprint:
            raise CheckpointError(
                f"{path} was made with other settings, data or model; choose another output folder, or start afresh "
                "with resume: false"
            )
        return True

    def _point(self, name: str, target: Path) -> None:
        link = self.folder / f".{name}.part"
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        os.replace(link, self.folder / name)

    def _prune(self) -> None:
        kept = {*sorted(self.folder.glob("step-*"))[-self.keep_last :], self.best()}
        for path in self.folder.glob("step-*"):
            if path not in kept and path.resolve() not in kept:
                shutil.rmtree(path)

    def clear(self) -> None:
        """Forgets every checkpoint, for a run that starts from the beginning."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
