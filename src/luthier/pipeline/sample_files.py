"""What is kept of a sampling beside its output: every answer and its reward, so that an interrupted one goes on.

Answers and rewards are written in batches, each file whole. What failed is not written: the same command asks and
scores it again. Answers belong to how they were sampled, rewards to the answers and to what gives them, the output to
both and to how it is chosen; made_of.json says each.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.errors import CheckpointError, RecipeError
from luthier.files import write_whole
from luthier.pipeline.sealed import read_rows, read_sealed, write_sealed
from luthier.rollout.scoring import Failure, Score

__all__ = ["Answer", "SampleFiles"]


@dataclass(frozen=True, slots=True)
class Answer:
    """finished: it ended by itself, and not because it was as long as it may be."""

    text: str
    finished: bool


@dataclass(frozen=True, slots=True)
class SampleFiles:
    """The folder beside an output: answers-N.jsonl and rewards-N.jsonl, a prompt a line, by its place."""

    output: Path

    @property
    def folder(self) -> Path:
        """OUTPUT.sampled."""
        return self.output.with_name(f"{self.output.name}.sampled")

    def claim(self, answers: Mapping[str, Any], rewards: Mapping[str, Any], choice: Mapping[str, Any]) -> None:
        """Makes output and folder this run's, by what its answers, its rewards and its choice are made of.

        An output of another run is refused, and so are another run's answers; without an output, answers are taken over
        where only rewards or the choice differ. Raises CheckpointError, and RecipeError for what cannot be written.
        """
        path = self.folder / "made_of.json"
        ours: dict[str, Any] = json.loads(json.dumps({"answers": answers, "rewards": rewards, "choice": choice}))
        try:
            mend = f"choose another output, or delete {self.folder}"
            found = read_sealed(path, mend=mend) if path.exists() else None
            self._refuse_others(ours, found)
            self.folder.mkdir(parents=True, exist_ok=True)
            if found is not None and found["rewards"] != ours["rewards"]:
                for file in self.folder.glob("rewards-*.jsonl"):
                    file.unlink()
            write_sealed(path, ours)
        except OSError as error:
            raise RecipeError(f"output: {self.folder} cannot be used ({error.strerror}); choose another") from error

    def _refuse_others(self, ours: dict[str, Any], found: dict[str, Any] | None) -> None:
        if self.output.exists() and found != ours:
            what = "was not made here" if found is None else f"is another run's ({_differing(ours, found)})"
            raise CheckpointError(f"{self.output} is there already and {what}; move it away, or choose another output")
        if found is not None and found["answers"] != ours["answers"]:
            what = _differing(ours, found)
            raise CheckpointError(
                f"{self.folder} holds another run's answers ({what}); choose another output, or delete that folder"
            )

    def answers(self) -> dict[int, tuple[Answer, ...]]:
        """What was sampled, by the prompt's place."""
        return {place: tuple(Answer(*one) for one in found) for place, found in self._read("answers").items()}

    def rewards(self) -> dict[int, list[float | None]]:
        """The rewards of a prompt's answers, None where there is none yet."""
        return self._read("rewards")

    def keep_answers(self, found: Mapping[int, Sequence[Answer]]) -> None:
        """Writes what was sampled."""
        self._write("answers", {place: [[one.text, one.finished] for one in some] for place, some in found.items()})

    def keep_rewards(self, found: Mapping[int, Sequence[Score | None]]) -> None:
        """Writes rewards; a failure is none."""
        plain = {
            place: [None if isinstance(one, Failure) else one for one in scores] for place, scores in found.items()
        }
        self._write("rewards", plain)

    def _read(self, kind: str) -> dict[int, Any]:
        """By place; what was written later counts."""
        files = sorted(self.folder.glob(f"{kind}-*.jsonl"))
        rows = [row for file in files for row in self._rows(file, kind)]
        return {row["prompt"]: row[kind] for row in rows}

    def _rows(self, file: Path, kind: str) -> list[dict[str, Any]]:
        return read_rows(file, mend=f"delete it, and its {kind} are had anew", names=("prompt", kind))

    def _write(self, kind: str, values: Mapping[int, Any]) -> None:
        number = len(list(self.folder.glob(f"{kind}-*.jsonl")))
        rows = [json.dumps({"prompt": place, kind: value}, ensure_ascii=False) for place, value in values.items()]
        write_whole(self.folder / f"{kind}-{number:06d}.jsonl", "\n".join(rows) + "\n")


def _differing(ours: dict[str, Any], found: dict[str, Any]) -> str:
    """The names of what two runs are not both made of."""
    return ", ".join(name for part, values in ours.items() for name in values if found[part].get(name) != values[name])
