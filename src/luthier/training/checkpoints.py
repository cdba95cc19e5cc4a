"""Checkpoints that survive a kill or a full disk at any instant.

A checkpoint is written into a folder beside, flushed to the disk, and then renamed, so a folder with a checkpoint's
name is always whole. It holds a hash of all that is in it; a damaged one is passed over, with a warning, for the one
before it. `last` and `best` are links, exchanged by renaming too, and set right where a kill came in between.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from luthier.errors import CheckpointError
from luthier.files import flush, not_written, replacing, written_whole
from luthier.training.state import Progress, TrainState

__all__ = ["Checkpoints", "load_trained"]

logger = logging.getLogger(__name__)

_TENSORS, _STATE = "state.safetensors", "progress.json"
_MEND = ", or lower keep_last, and run again, which goes on from the checkpoint before"


class Checkpoints:
    """The checkpoints of one run, in `folder`: the newest `keep_last`, and the best besides.

    fingerprint: what a checkpoint must share with the run that goes on from it (settings, data, model).
    """

    def __init__(self, folder: Path, *, keep_last: int, fingerprint: str) -> None:
        self.folder, self.keep_last, self.fingerprint = folder, keep_last, fingerprint

    def save(self, state: TrainState, *, best: bool = False) -> Path:
        """Writes the state of a step, with the weights that are to be evaluated; returns the checkpoint's folder. An
        existing one of the same step is replaced.

        Raises CheckpointError where there is no room for it; those before it stay as they are.
        """
        return self._saved(state, {"best": best, "between": False})

    def save_between(self, state: TrainState) -> Path:
        """As `save`, at a step that has none by the settings, unless it has one: for a run that is stopped there. It
        does not count among the newest, and goes with the next one.
        """
        final = self._place(state)
        return final if final.exists() else self._saved(state, {"best": False, "between": True})

    def _place(self, state: TrainState) -> Path:
        return self.folder / f"step-{state.progress.step:08d}"

    def _saved(self, state: TrainState, kind: dict[str, bool]) -> Path:
        final = self._place(state)
        state.eval()
        tensors = {name: t.detach().to("cpu").contiguous() for name, t in state.tensors().items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(tensors, {"progress": state.progress.as_dict(), **kind}, final)
            self._link(final)
            flush(self.folder)
            self._prune(final)
        except (OSError, SafetensorError) as error:
            wanted = sum(tensor.nbytes for tensor in tensors.values())
            raise CheckpointError(not_written(final, error, wanted=wanted, mend=_MEND)) from error
        return final

    def _write(self, tensors: dict[str, Tensor], described: dict[str, Any], final: Path) -> None:
        described = {**described, "fingerprint": self.fingerprint}
        with written_whole(final) as beside:
            save_file(tensors, beside / _TENSORS)
            described["sha256"] = _sha256(beside / _TENSORS, described)
            (beside / _STATE).write_text(json.dumps(described, indent=1))

    def latest(self) -> Path | None:
        """The newest whole checkpoint of this run, or None. Raises CheckpointError if it belongs to another run.

        `last` and `best` are right afterwards, and what is no longer kept is gone, also where a kill or damage came in
        between.
        """
        for path in sorted(self.folder.glob("step-*"), reverse=True):
            if self._is_whole(path):
                self._link(path)
                self._prune(path)
                return path
        return None

    def best(self) -> Path | None:
        """The checkpoint with the lowest evaluation loss, or None."""
        link = self.folder / "best"
        return self.folder / os.readlink(link) if link.exists() else None

    def newest_good(self, step: int) -> tuple[Path, int] | None:
        """The newest whole checkpoint of at most so many steps whose last step did not fail, and its step."""
        for path in reversed(self._regular()):
            if _step(path) <= step and not _failed(path) and self._is_whole(path):
                return path, _step(path)
        return None

    def go_back_to(self, path: Path, state: TrainState, *, leaving_out: Iterable[int]) -> None:
        """Loads a checkpoint and writes it once more, with these steps to be left out; later ones are forgotten."""
        best = bool(_described(path).get("best"))
        self.load(path, state)
        state.progress.left_out = sorted({*state.progress.left_out, *leaving_out})
        self.save(state, best=best)

    def load(self, path: Path, state: TrainState) -> None:
        """Puts a checkpoint into the state, bit for bit. Raises CheckpointError where it does not fit."""
        described = _described(path)
        tensors: dict[str, Tensor] = load_file(path / _TENSORS)
        try:
            state.restore(tensors, Progress(**described["progress"]))
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"{path}: does not fit this model ({error}); choose another output folder") from error

    def _is_whole(self, path: Path) -> bool:
        described = _described(path)
        expected = described.pop("sha256", None)
        whole = (path / _TENSORS).is_file() and expected == _sha256(path / _TENSORS, described)
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
        with replacing(self.folder / name) as link:
            link.symlink_to(target.name)

    def _link(self, last: Path) -> None:
        """Sets `last` and `best`: of the checkpoints up to the last that were the best when made, the newest."""
        self._point("last", last)
        earlier = [path for path in sorted(self.folder.glob("step-*")) if path <= last and _described(path).get("best")]
        if earlier:
            self._point("best", earlier[-1])
        else:
            (self.folder / "best").unlink(missing_ok=True)

    def _prune(self, newest: Path) -> None:
        """Checkpoints after the newest were damaged, or steps failed: the run went back behind them and is making them
        again. Those made while steps fail are kept besides, so that there is one from before to go back to.
        """
        good = [path for path in self._regular() if path <= newest and not _failed(path)]
        kept = {newest, *good[-self.keep_last :], self.best()}
        for path in self.folder.glob("step-*"):
            if path not in kept:
                shutil.rmtree(path)

    def _regular(self) -> list[Path]:
        """Those that a run which is never stopped has as well, in order."""
        return [path for path in sorted(self.folder.glob("step-*")) if not _described(path).get("between")]

    def oldest_step(self) -> int:
        """The step of the oldest checkpoint that is kept by the settings, 0 where there is none."""
        return min(map(_step, self._regular()), default=0)

    def clear(self) -> None:
        """Forgets every checkpoint, for a run that starts from the beginning."""
        shutil.rmtree(self.folder, ignore_errors=True)


@torch.no_grad()
def load_trained(network: nn.Module, checkpoint: Path) -> None:
    """Puts what a checkpoint's run has trained into the network, tensor by tensor, and nothing else. What the network
    has no place for, as a head that is there while training, is left out.
    """
    places = dict(network.named_parameters())
    with safe_open(checkpoint / _TENSORS, "pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118, the file is no dict
            if (name := key.removeprefix("parameter/")) in places:
                places[name].copy_(tensors.get_tensor(key))


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _failed(path: Path) -> bool:
    """Whether the last step before this checkpoint failed."""
    return bool(_described(path).get("progress", {}).get("skipped_steps"))


def _described(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; nothing where that cannot be read."""
    try:
        described = json.loads((path / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return described if isinstance(described, dict) else {}


def _sha256(tensors: Path, described: dict[str, Any]) -> str:
    with tensors.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(json.dumps(described, sort_keys=True).encode())
    return digest.hexdigest()
