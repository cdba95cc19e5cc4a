"""What a run's folder tells of its stages, for reports: read from the files alone, so also of a run that is going."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.errors import CheckpointError
from luthier.pipeline.done import is_done
from luthier.pipeline.rounds import read_rounds
from luthier.pipeline.sealed import read_rows
from luthier.pipeline.watch import WATCHED, read_watched
from luthier.recipe.document import Recipe, load_recipe
from luthier.training.callbacks import Metrics, read_metrics, total_of

__all__ = ["StageRecord", "points_of", "recipe_in", "stages_of"]

_SHOWN_ANSWERS = 4  # of the highest and of the lowest rewards


@dataclass(frozen=True, slots=True)
class StageRecord:
    """One stage, or one round of it. steps, evaluations: lines of metrics.jsonl. energy_joules: None where not every
    line tells it. won: of a round, how often against the start. answers: of the last rollout, those with the highest
    rewards and those with the lowest. watched: prompts with the model's answers at the first evaluation and the last.
    """

    word: str
    name: str
    done: bool
    steps: list[Metrics]
    evaluations: list[Metrics]
    seconds: float
    energy_joules: float | None
    won: str
    answers: list[dict[str, Any]]
    watched: list[dict[str, str]]

    @property
    def held_out(self) -> bool:
        """Whether there is an evaluation from before the stage and one from after a step of it."""
        return len(self.evaluations) > 1 and self.evaluations[0]["step"] == 0

    @property
    def state(self) -> str:
        """In words."""
        return "done" if self.done else "not finished" if self.steps else "no step done yet"

    @property
    def tokens_per_second(self) -> float:
        """Over all steps, evaluations apart."""
        return float(self.steps[-1]["tokens"] / sum(line["seconds"] for line in self.steps))

    @property
    def memory_bytes(self) -> int:
        """The most in use."""
        return max(int(line["memory_bytes"]) for line in self.steps)


def recipe_in(folder: Path) -> Recipe:
    """The recipe of the run in the folder. Raises CheckpointError where the folder holds no run."""
    if not (folder / "recipe.yaml").is_file():
        raise CheckpointError(f"{folder} holds no run (recipe.yaml is missing); name the output folder of a recipe")
    return load_recipe(folder / "recipe.yaml")


def stages_of(folder: Path, recipe: Recipe) -> list[StageRecord]:
    """The stages of the run in the folder, those of several rounds as their rounds."""
    places = [(stage.word, folder / f"{index:02d}-{stage.word}") for index, stage in enumerate(recipe.stages)]
    return [_read_stage(word, part) for word, place in places for part in _parts(place)]


def points_of(lines: Sequence[Metrics], key: str) -> list[tuple[float, float]]:
    """(step, value) of the lines that tell it."""
    return [(line["step"], line[key]) for line in lines if key in line]


def _parts(folder: Path) -> list[Path]:
    """The folders of a stage's rounds, in order; its own where it has none."""
    rounds = sorted(folder.glob("round-*"), key=lambda path: int(path.name.removeprefix("round-")))
    return rounds or [folder]


def _read_stage(word: str, folder: Path) -> StageRecord:
    lines, in_rounds = read_metrics(folder / "metrics.jsonl"), folder.name.startswith("round-")
    return StageRecord(
        word=f"{word} {folder.name}" if in_rounds else word,
        name=f"{folder.parent.name}/{folder.name}" if in_rounds else folder.name,
        won=next((str(result) for result in read_rounds(folder.parent) if f"round-{result.round}" == folder.name), ""),
        done=is_done(folder),
        steps=[line for line in lines if "loss" in line],
        evaluations=[line for line in lines if "eval_loss" in line],
        seconds=total_of(lines, "seconds") or 0.0,
        energy_joules=total_of(lines, "energy_joules") if lines else None,
        answers=_read_answers(folder / "rollouts"),
        watched=_read_watched(folder / WATCHED),
    )


def _read_watched(path: Path) -> list[dict[str, str]]:
    """The watched prompts with their first answers and their last; none before there are two evaluations."""
    rows = read_watched(path)
    steps = [row["step"] for row in rows]
    if len(set(steps)) < 2:
        return []
    before, after = (
        {row["prompt"]: row["answer"] for row in rows if row["step"] == step} for step in (steps[0], steps[-1])
    )
    return [{"prompt": one, "before": before[one], "after": after[one]} for one in after if one in before]


def _read_answers(folder: Path) -> list[dict[str, Any]]:
    """Some of the newest rollout's answers, by their rewards; none where there are no rollouts."""
    newest = max(folder.glob("*/answers.jsonl"), default=None)
    if newest is None:
        return []
    rows = read_rows(newest, mend="delete it: people alone read it", names=("reward",))
    scored = sorted((row for row in rows if row["reward"] is not None), key=lambda row: -row["reward"])
    return scored if len(scored) <= 2 * _SHOWN_ANSWERS else [*scored[:_SHOWN_ANSWERS], *scored[-_SHOWN_ANSWERS:]]
