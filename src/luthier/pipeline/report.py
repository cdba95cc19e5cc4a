"""report.html: what a run was and what came of it, on one page that needs nothing else, for whoever gets the model.

The page is read from the run's folder alone, so it can be written again at any time, also while a run is going: what
is not there yet is said. All text passes the template's escaping, and the page forbids scripts and outside resources.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from luthier.errors import CheckpointError
from luthier.pipeline.report_page import change, duration, energy, gibibytes, number, rendered, write_page
from luthier.pipeline.report_svg import Chart, Line, chart, smoothed
from luthier.pipeline.sealed import read_rows
from luthier.pipeline.stage_record import StageRecord, points_of, recipe_in, stages_of
from luthier.recipe.document import Recipe
from luthier.recipe.settings import flat
from luthier.training.callbacks import complete

__all__ = ["Sample", "write_report"]

_CHARTS = {"learning_rate": "Learning rate", "grad_norm": "Gradient norm", "tokens_per_second": "Tokens per second"}
_HELD_OUT = {
    "eval_loss": "Held-out loss",
    "eval_perplexity": "Held-out perplexity",
    "eval_rewards/accuracies": "Held-out accuracy",
    "eval_reward": "Held-out reward",
}
_NO_CHART = {"step", "epoch", "seconds", "tokens", "loss", "memory_bytes", "energy_joules", *_CHARTS}

Rows = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt with the answers of the model before the run and after it."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class _Card:
    label: str
    value: str
    note: str = ""


def write_report(folder: Path, *, samples: Sequence[Sample] = (), output: Path | None = None) -> Path:
    """Writes report.html into a run's folder, or the page elsewhere, and returns its path.

    samples: kept in the folder as samples.jsonl, for later reports too; without any, those that are kept are shown.
    Raises CheckpointError where the folder holds no run.
    """
    recipe = recipe_in(folder)
    if samples:
        write_page(folder / "samples.jsonl", "".join(json.dumps(asdict(sample)) + "\n" for sample in samples))
    stages = stages_of(folder, recipe)
    with complete(folder / "*" / "metrics.jsonl"):
        shown = [(stage, _cards(stage), _charts(stage)) for stage in stages]
    values = {
        "name": folder.resolve().name,
        "path": " → ".join([recipe.model, *(stage.word for stage in recipe.stages)]),
        "result": _result(stages),
        "stages": shown,
        "tables": {"Recipe": _recipe_table(recipe), "Made of": _manifest_table(folder / "manifest.json")},
        "samples": _read_samples(folder / "samples.jsonl"),
    }
    return write_page(output or folder / "report.html", rendered("report.html.jinja", values))


def _read_samples(path: Path) -> list[Sample]:
    names = [part.name for part in fields(Sample)]
    rows = read_rows(path, mend="delete it, or have it written anew", names=names) if path.exists() else []
    return [Sample(**{name: row[name] for name in names}) for row in rows]


def _result(stages: Sequence[StageRecord]) -> str:
    """The run in one sentence: what its last stage that has begun did to the loss."""
    begun = [stage for stage in stages if stage.steps]
    if not begun:
        return "No step is done yet."
    stage, unfinished = begun[-1], not all(stage.done for stage in stages)
    key, what = next(reversed(_compared(stage).items())) if stage.held_out else ("loss", "Training loss")
    lines = stage.evaluations if stage.held_out else stage.steps
    before, after, what = lines[0][key], lines[-1][key], what[0].lower() + what[1:]
    return (
        f"{'Not finished. ' if unfinished else ''}In {stage.name}, {what} went from {number(before)} to "
        f"{number(after)}{change(before, after, ' ({})')} in {stage.steps[-1]['step']:,} steps and "
        f"{duration(stage.seconds)}{'' if stage.held_out else '; no held-out comparison was made'}."
    )


def _cards(stage: StageRecord) -> list[_Card]:
    if not stage.steps:
        return []
    last, stepping = stage.steps[-1], sum(line["seconds"] for line in stage.steps)
    return [
        _Card("Steps", f"{last['step']:,}", f"epoch {last['epoch']:.2f}"),
        _Card("Time", duration(stage.seconds), f"{1000 * stepping / len(stage.steps):,.0f} ms a step"),
        _Card("Tokens", f"{last['tokens']:,}"),
        _Card("Tokens per second", number(stage.tokens_per_second)),
        _Card("Final loss", number(last["loss"]), f"first {number(stage.steps[0]['loss'])}"),
        *([_Card("Wins against the start", *stage.won.split(" ", 1))] if stage.won else _held_out_cards(stage)),
        _Card("Peak memory", gibibytes(stage.memory_bytes)),
        *_energy_cards(stage),
    ]


def _energy_cards(stage: StageRecord) -> list[_Card]:
    joules = stage.energy_joules
    return [] if joules is None else [_Card("Energy", energy(joules), "of processors, memory and GPU")]


def _compared(stage: StageRecord) -> dict[str, str]:
    """What evaluations measured, by name, the most telling last."""
    measured = stage.evaluations[0] if stage.evaluations else {}
    return {name: label for name, label in _HELD_OUT.items() if name in measured or name == "eval_loss"}


def _held_out_cards(stage: StageRecord) -> list[_Card]:
    names = _compared(stage)
    if not stage.held_out:
        missing = f"{len(stage.evaluations)} of 2 evaluations" if stage.evaluations else "nothing was held out"
        return [_Card(label, "not compared", missing) for label in names.values()]
    pairs = [(label, stage.evaluations[0][key], stage.evaluations[-1][key]) for key, label in names.items()]
    return [_Card(name, f"{number(old)} → {number(new)}", change(old, new, "{}")) for name, old, new in pairs]


def _charts(stage: StageRecord) -> list[Chart]:
    if not stage.steps:
        return []
    others = {name: None for line in stage.steps for name in line if name not in _NO_CHART}
    loss = points_of(stage.steps, "loss")
    held_out = [Line("held out", "held", points_of(stage.evaluations, "eval_loss"))] if stage.evaluations else []
    memory = [(step, value / 2**30) for step, value in points_of(stage.steps, "memory_bytes")]
    return [
        chart("Loss", [Line("each step", "raw", loss), Line("smoothed", "smooth", smoothed(loss)), *held_out]),
        *(chart(title, _single(stage, title, key), from_zero=True) for key, title in _CHARTS.items()),
        chart("Memory in GiB", [Line("Memory", "single", memory)], from_zero=True),
        *(chart(name.replace("_", " ").capitalize(), _single(stage, name, name)) for name in others),
    ]


def _single(stage: StageRecord, label: str, key: str) -> list[Line]:
    return [Line(label, "single", points_of(stage.steps, key))]


def _recipe_table(recipe: Recipe) -> dict[str, Rows]:
    table = {"run": list(flat(recipe.model_dump(mode="json", exclude={"stages"})))}
    for index, stage in enumerate(recipe.stages):
        settings = stage.settings.model_dump(mode="json", exclude={"model", "output"})
        table[f"{index:02d}-{stage.word}"] = list(flat(settings))
    return table


def _manifest_table(path: Path) -> dict[str, Rows]:
    """Sections of the manifest; none before the end of a run, when it is written."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        tables = {name: values for name, values in manifest.items() if isinstance(values, Mapping)}  # not the recipe
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: is damaged ({error}); run the recipe again, which writes it anew") from None
    return {section.replace("_", " "): list(flat(values)) for section, values in tables.items()}
