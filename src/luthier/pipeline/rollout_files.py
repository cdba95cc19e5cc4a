"""A rollout's files: what was sampled, how it was scored, and what is learned from it, each written once and whole.

An interrupted rollout goes on from what is written, if it is of the same run. Answers with their rewards stay, for
people to read; the rest goes once no checkpoint is left that would need it.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from luthier.errors import CheckpointError
from luthier.files import file_hash, replacing, write_whole
from luthier.pipeline.sealed import OTHER, read_sealed, read_sealed_rows, write_sealed, write_sealed_rows
from luthier.rollout.requests import Sample
from luthier.rollout.scoring import Failure

__all__ = ["RolloutFiles", "Sampled", "claim_rollouts"]

_FOLDER = "rollouts"
_HASH = "batch_sha256"
_MEND = "copy it back, or begin anew with resume: false"

Sampled = tuple[Sample, ...] | Failure


@dataclass(frozen=True, slots=True)
class RolloutFiles:
    """The folder of one rollout: samples-N.jsonl, of each time that prompts were answered; answers.jsonl, with rewards;
    batch.safetensors, tokens and what is known of them; rollout.json, numbers.
    """

    folder: Path

    @classmethod
    def of(cls, stage: Path, number: int) -> "RolloutFiles":
        """Of the rollout of this number."""
        return cls(stage / _FOLDER / f"{number:06d}")

    def samples(self, attempt: int) -> list[Sampled] | None:
        """What was sampled, None where it was not."""
        path = self.folder / f"samples-{attempt}.jsonl"
        mend = "delete it, and it is sampled anew"
        return [_sampled(row) for row in read_sealed_rows(path, mend=mend)] if path.exists() else None

    def keep_samples(self, attempt: int, found: Sequence[Sampled]) -> None:
        """Writes what was sampled."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_sealed_rows(self.folder / f"samples-{attempt}.jsonl", [_as_values(one) for one in found])

    def keep_answers(self, rows: Sequence[dict[str, Any]]) -> None:
        """Writes the answers with their rewards."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / "answers.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def batch(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What is learned from, and the rollout's numbers; None where it is not finished. Raises CheckpointError."""
        path, numbers = self.folder / "batch.safetensors", self.numbers()
        if numbers is None or not path.exists():
            return None
        self._forget_samples()
        why = OTHER
        try:
            if file_hash(path) == numbers.pop(_HASH, None):
                with safe_open(path, framework="pt") as file:
                    return {name: file.get_tensor(name) for name in file.keys()}, numbers  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            why = str(error)
        raise CheckpointError(
            f"{path}: cannot be read ({why}); delete it, and it is sampled anew, by the policy as it is by then"
        )

    def keep_batch(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Writes what is learned from, and then the numbers, which say that all is there."""
        with replacing(self.folder / "batch.safetensors") as beside:
            save_file(tensors, beside)
        write_sealed(self.folder / "rollout.json", {**numbers, _HASH: file_hash(self.folder / "batch.safetensors")})
        self._forget_samples()

    def numbers(self) -> dict[str, Any] | None:
        """What is told of the rollout, None where it is not finished."""
        path = self.folder / "rollout.json"
        return read_sealed(path, mend=_MEND) if path.exists() else None

    def forget_batch(self) -> None:
        """Deletes what is needed for learning alone."""
        (self.folder / "batch.safetensors").unlink(missing_ok=True)

    def _forget_samples(self) -> None:
        for path in self.folder.glob("samples-*.jsonl"):
            path.unlink()


def claim_rollouts(stage: Path, fingerprint: str, *, anew: bool) -> None:
    """Makes the stage's rollouts those of the run with this fingerprint; others are deleted, and with `anew` all."""
    folder = stage / _FOLDER
    owner = folder / "run.txt"
    if anew or not owner.exists() or owner.read_text(encoding="utf-8") != fingerprint:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_whole(owner, fingerprint)


def _as_values(found: Sampled) -> dict[str, Any]:
    if isinstance(found, Failure):
        return {"failure": [found.reason, found.detail]}
    return {
        "answers": [
            {
                "token_ids": one.token_ids.tolist(),
                "logprobs": [None if np.isnan(p) else p for p in one.logprobs.tolist()],
                "text": one.text,
                "finished": one.finished,
            }
            for one in found
        ]
    }


def _sampled(values: dict[str, Any]) -> Sampled:
    if "failure" in values:
        return Failure(*values["failure"])
    return tuple(
        Sample(np.array(one["token_ids"], dtype=np.int32), _floats(one["logprobs"]), one["text"], one["finished"])
        for one in values["answers"]
    )


def _floats(values: Sequence[float | None]) -> NDArray[np.float32]:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float32)
