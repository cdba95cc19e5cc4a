"""Several runs beside one another: the settings that differ, what came of each stage, and curves over one another.

Stages are matched by their words, the second stage of a word with the second. A run may be going, or have failed: what
is not there stays empty. Losses are comparable where data and objective are; that is the reader's to know.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.errors import CheckpointError
from luthier.pipeline.report_page import duration, energy, gibibytes, number, rendered, write_page
from luthier.pipeline.report_svg import Chart, Line, chart, smoothed
from luthier.pipeline.stage_record import StageRecord, points_of, recipe_in, stages_of
from luthier.recipe.document import Recipe
from luthier.recipe.settings import flat

__all__ = ["Comparison", "Table", "compare", "write_comparison"]

_COLOURS = 8  # that the page's style has

Value = float | None


@dataclass(frozen=True, slots=True)
class _Measure:
    """A number of a stage that has begun, and how people read it."""

    label: str
    of: Callable[[StageRecord], Value]
    text: Callable[[float], str]


@dataclass(frozen=True, slots=True)
class _Run:
    """settings: as text, by stage and dotted name; the run's own under the stage "". stages: by word."""

    name: str
    folder: Path
    settings: dict[str, dict[str, str]]
    stages: dict[str, StageRecord]


@dataclass(frozen=True, slots=True)
class Table:
    """A name and one cell a run, row by row; empty where a run has none."""

    title: str
    rows: list[tuple[str, list[str]]]


def _last(lines: Sequence[Mapping[str, Any]], key: str) -> Value:
    return next((float(line[key]) for line in reversed(lines) if key in line), None)


def _best(stage: StageRecord) -> Value:
    return min((line["eval_loss"] for line in stage.evaluations if math.isfinite(line["eval_loss"])), default=None)


def _first_held_out(stage: StageRecord) -> Value:
    return float(stage.evaluations[0]["eval_loss"]) if stage.held_out else None


def _loss(value: float) -> str:
    return f"{value:.4f}"


_MEASURES = {
    "steps": _Measure("Steps", lambda stage: stage.steps[-1]["step"], lambda value: f"{value:,}"),
    "tokens": _Measure("Tokens", lambda stage: stage.steps[-1]["tokens"], lambda value: f"{value:,}"),
    "seconds": _Measure("Time", lambda stage: stage.seconds, duration),
    "tokens_per_second": _Measure("Tokens per second", lambda stage: stage.tokens_per_second, number),
    "final_loss": _Measure("Final loss", lambda stage: _last(stage.steps, "loss"), _loss),
    "first_eval_loss": _Measure("Held-out loss before", _first_held_out, _loss),
    "best_eval_loss": _Measure("Held-out loss, best", _best, _loss),
    "final_eval_loss": _Measure("Held-out loss, last", lambda stage: _last(stage.evaluations, "eval_loss"), _loss),
    "forgetting": _Measure(
        "Forgetting", lambda stage: _last(stage.evaluations, "eval_forgetting"), lambda value: f"{100 * value:+.2f} %"
    ),
    "memory_bytes": _Measure("Peak memory", lambda stage: stage.memory_bytes, lambda value: gibibytes(int(value))),
    "energy_joules": _Measure("Energy", lambda stage: stage.energy_joules, energy),
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """The runs that were read, in the order in which they were named."""

    runs: list[_Run]

    @property
    def names(self) -> list[str]:
        return [run.name for run in self.runs]

    @property
    def words(self) -> list[str]:
        """The stages of all runs: `sft`, and `sft 2` for the second of one run."""
        return list(dict.fromkeys(word for run in self.runs for word in run.stages))

    def differing(self) -> Table:
        """The settings that are not the same in all runs that have the stage."""
        return Table("Settings that differ", [row for word in ["", *self.words] for row in self._differing(word)])

    def _differing(self, word: str) -> Iterator[tuple[str, list[str]]]:
        found = [run.settings.get(word) for run in self.runs]
        for name in dict.fromkeys(name for settings in found if settings is not None for name in settings):
            if len({settings.get(name) for settings in found if settings is not None}) > 1:
                yield f"{word}.{name}".lstrip("."), [(settings or {}).get(name, "") for settings in found]

    def measured(self, word: str) -> Table:
        """What came of the stage; without measures that no run has."""
        stages = [run.stages.get(word) for run in self.runs]
        rows = [("State", ["" if stage is None else stage.state for stage in stages])]
        for measure in _MEASURES.values():
            values = [_value(measure, stage) for stage in stages]
            if any(value is not None for value in values):
                rows.append((measure.label, ["" if value is None else measure.text(value) for value in values]))
        return Table(word, rows)

    def charts(self, word: str) -> list[Chart]:
        """The loss and the held-out loss of the stage; none where no run has begun it."""
        stages = [run.stages.get(word) for run in self.runs]
        losses = [smoothed(points_of(stage.steps, "loss")) if stage else [] for stage in stages]
        held_out = [points_of(stage.evaluations, "eval_loss") if stage else [] for stage in stages]
        titled = {"Loss, smoothed": losses, "Held-out loss": held_out}
        return [chart(title, self._lines(curves)) for title, curves in titled.items() if any(curves)]

    def _lines(self, curves: Sequence[Sequence[tuple[float, float]]]) -> list[Line]:
        numbered = enumerate(zip(self.names, curves, strict=True))
        return [Line(name, _colour_of(index), points) for index, (name, points) in numbered if points]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; None for what is not there or not finite."""
        differing = {name: dict(zip(self.names, cells, strict=True)) for name, cells in self.differing().rows}
        return {
            "runs": [{"name": run.name, "folder": str(run.folder)} for run in self.runs],
            "settings": differing,
            "stages": {word: {run.name: _plain(run.stages.get(word)) for run in self.runs} for word in self.words},
        }


def compare(folders: Sequence[Path]) -> Comparison:
    """Reads the runs in the folders. Raises CheckpointError for one that holds none, or that is named twice."""
    places = [folder.resolve() for folder in folders]
    twice = [str(folder) for folder, count in Counter(places).items() if count > 1]
    if twice:
        raise CheckpointError(f"{', '.join(twice)} is named twice; name each run once")
    return Comparison([_read(name, folder) for name, folder in zip(_names(places), folders, strict=True)])


def write_comparison(comparison: Comparison, path: Path) -> Path:
    """Writes the page, which needs nothing else, and returns its path."""
    values = {
        "names": [(name, _colour_of(index)) for index, name in enumerate(comparison.names)],
        "differing": comparison.differing(),
        "stages": [(comparison.measured(word), comparison.charts(word)) for word in comparison.words],
    }
    return write_page(path, rendered("compare.html.jinja", values))


def _colour_of(index: int) -> str:
    """The classes of CSS by which a run is told from the others; after the last colour, thinner."""
    return f"run-{index % _COLOURS}" + (" again" if index >= _COLOURS else "")


def _read(name: str, folder: Path) -> _Run:
    recipe = recipe_in(folder)
    stages = stages_of(folder, recipe)
    settings = dict(zip(_numbered([stage.word for stage in recipe.stages]), _settings(recipe), strict=True))
    named = dict(zip(_numbered([stage.word for stage in stages]), stages, strict=True))
    return _Run(name, folder, {"": {"model": recipe.model}, **settings}, named)


def _settings(recipe: Recipe) -> Iterator[dict[str, str]]:
    for stage in recipe.stages:
        named = flat(stage.settings.model_dump(mode="json", exclude={"model", "output"}))
        yield {name: "none" if text == "null" else text for name, text in named}


def _numbered(words: Sequence[str]) -> list[str]:
    """`sft`, `dpo`, `sft 2`."""
    seen: Counter[str] = Counter()
    numbered = []
    for word in words:
        seen[word] += 1
        numbered.append(word if seen[word] == 1 else f"{word} {seen[word]}")
    return numbered


def _names(places: Sequence[Path]) -> list[str]:
    """The folders' own names; what of their paths is not common to all, where two have the same."""
    names = [place.name for place in places]
    if len(set(names)) == len(names):
        return names
    common = Path(os.path.commonpath(places))
    return [str(place.relative_to(common)) for place in places]


def _value(measure: _Measure, stage: StageRecord | None) -> Value:
    return measure.of(stage) if stage is not None and stage.steps else None


def _plain(stage: StageRecord | None) -> dict[str, Any] | None:
    if stage is None:
        return None
    values = {name: _value(measure, stage) for name, measure in _MEASURES.items()}
    finite = {name: None if value is None or not math.isfinite(value) else value for name, value in values.items()}
    return {"state": stage.state, **finite}
