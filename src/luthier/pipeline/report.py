"""report.html: what a run was and what came of it, on one page that needs nothing else, for whoever gets the model.

The page is read from the run's folder alone, so it can be written again at any time, also while a run is going: what
is not there yet is said. All text passes the template's escaping, and the page forbids scripts and outside resources.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from luthier.errors import CheckpointError
from luthier.files import replacing
from luthier.pipeline.report_svg import FRAME, Chart, Line, chart, smoothed
from luthier.pipeline.rounds import read_rounds
from luthier.pipeline.watch import WATCHED, read_watched
from luthier.recipe.document import Recipe, load_recipe
from luthier.training.callbacks import Metrics, read_metrics

__all__ = ["Sample", "write_report"]

_CHARTS = {"learning_rate": "Learning rate", "grad_norm": "Gradient norm", "tokens_per_second": "Tokens per second"}
_HELD_OUT = {
    "eval_loss": "Held-out loss",
    "eval_perplexity": "Held-out perplexity",
    "eval_rewards/accuracies": "Held-out accuracy",
    "eval_reward": "Held-out reward",
}
_NO_CHART = {"step", "epoch", "seconds", "tokens", "loss", "memory_bytes", *_CHARTS}

_SHOWN_ANSWERS = 4  # of the highest and of the lowest rewards

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


@dataclass(frozen=True, slots=True)
class _Stage:
    """One stage as its folder tells it; steps and evaluations are lines of metrics.jsonl. won: of a round, how often
    against the start. answers: of the last rollout, those with the highest rewards and those with the lowest. watched:
    prompts with the model's answers at the first evaluation and at the last.
    """

    name: str
    done: bool
    steps: list[Metrics]
    evaluations: list[Metrics]
    seconds: float
    won: str
    answers: list[dict[str, Any]]
    watched: list[Sample]

    @property
    def held_out(self) -> bool:
        """Whether there is an evaluation from before the stage and one from after a step of it."""
        return len(self.evaluations) > 1 and self.evaluations[0]["step"] == 0


def write_report(folder: Path, *, samples: Sequence[Sample] = ()) -> Path:
    """Writes report.html into a run's folder and returns its path.

    samples: kept in the folder as samples.jsonl, for later reports too; without any, those that are kept are shown.
    Raises CheckpointError where the folder holds no run.
    """
    if not (folder / "recipe.yaml").is_file():
        raise CheckpointError(f"{folder} holds no run (recipe.yaml is missing); name the output folder of a recipe")
    if samples:
        _replace(folder / "samples.jsonl", "".join(json.dumps(asdict(sample)) + "\n" for sample in samples))
    recipe = load_recipe(folder / "recipe.yaml")
    places = [folder / f"{index:02d}-{stage.word}" for index, stage in enumerate(recipe.stages)]
    stages = [_read_stage(part) for place in places for part in _parts(place)]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html.jinja").render(
        name=folder.resolve().name,
        path=" → ".join([recipe.model, *(stage.word for stage in recipe.stages)]),
        result=_result(stages),
        stages=[(stage, _cards(stage), _charts(stage)) for stage in stages],
        tables={"Recipe": _recipe_table(recipe), "Made of": _manifest_table(folder / "manifest.json")},
        samples=_read_samples(folder / "samples.jsonl"),
        frame=FRAME,
    )
    return _replace(folder / "report.html", page)


def _replace(path: Path, text: str) -> Path:
    """Writes the file whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8", errors="replace")  # a lone surrogate in a message has no bytes
    return path


def _read_samples(path: Path) -> list[Sample]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Sample(**json.loads(line)) for line in lines]


def _parts(folder: Path) -> list[Path]:
    """The folders of a stage's rounds, in order; its own where it has none."""
    rounds = sorted(folder.glob("round-*"), key=lambda path: int(path.name.removeprefix("round-")))
    return rounds or [folder]


def _read_stage(folder: Path) -> _Stage:
    lines = read_metrics(folder / "metrics.jsonl")
    return _Stage(
        name=folder.name if not folder.name.startswith("round-") else f"{folder.parent.name}/{folder.name}",
        won=next((str(result) for result in read_rounds(folder.parent) if f"round-{result.round}" == folder.name), ""),
        done=(folder / "done.json").exists(),
        steps=[line for line in lines if "loss" in line],
        evaluations=[line for line in lines if "eval_loss" in line],
        seconds=sum(line["seconds"] for line in lines),
        answers=_read_answers(folder / "rollouts"),
        watched=_read_watched(folder / WATCHED),
    )


def _read_watched(path: Path) -> list[Sample]:
    """The watched prompts with their first answers and their last; none before there are two evaluations."""
    rows = read_watched(path)
    steps = [row["step"] for row in rows]
    if len(set(steps)) < 2:
        return []
    before, after = (
        {row["prompt"]: row["answer"] for row in rows if row["step"] == step} for step in (steps[0], steps[-1])
    )
    return [Sample(prompt, before[prompt], answer) for prompt, answer in after.items() if prompt in before]


def _read_answers(folder: Path) -> list[dict[str, Any]]:
    """Some of the newest rollout's answers, by their rewards; none where there are no rollouts."""
    newest = max(folder.glob("*/answers.jsonl"), default=None)
    if newest is None:
        return []
    rows = [json.loads(line) for line in newest.read_text(encoding="utf-8").split("\n") if line]
    scored = sorted((row for row in rows if row["reward"] is not None), key=lambda row: -row["reward"])
    return scored if len(scored) <= 2 * _SHOWN_ANSWERS else [*scored[:_SHOWN_ANSWERS], *scored[-_SHOWN_ANSWERS:]]


def _result(stages: Sequence[_Stage]) -> str:
    """The run in one sentence: what its last stage that has begun did to the loss."""
    begun = [stage for stage in stages if stage.steps]
    if not begun:
        return "No step is done yet."
    stage, unfinished = begun[-1], not all(stage.done for stage in stages)
    key, what = next(reversed(_compared(stage).items())) if stage.held_out else ("loss", "Training loss")
    lines = stage.evaluations if stage.held_out else stage.steps
    before, after, what = lines[0][key], lines[-1][key], what[0].lower() + what[1:]
    return (
        f"{'Not finished. ' if unfinished else ''}In {stage.name}, {what} went from {_number(before)} to "
        f"{_number(after)}{_change(before, after, ' ({})')} in {stage.steps[-1]['step']:,} steps and "
        f"{_duration(stage.seconds)}{'' if stage.held_out else '; no held-out comparison was made'}."
    )


def _cards(stage: _Stage) -> list[_Card]:
    if not stage.steps:
        return []
    last, stepping = stage.steps[-1], sum(line["seconds"] for line in stage.steps)
    return [
        _Card("Steps", f"{last['step']:,}", f"epoch {last['epoch']:.2f}"),
        _Card("Time", _duration(stage.seconds), f"{1000 * stepping / len(stage.steps):,.0f} ms a step"),
        _Card("Tokens", f"{last['tokens']:,}"),
        _Card("Tokens per second", _number(last["tokens"] / stepping)),
        _Card("Final loss", _number(last["loss"]), f"first {_number(stage.steps[0]['loss'])}"),
        *([_Card("Wins against the start", *stage.won.split(" ", 1))] if stage.won else _held_out_cards(stage)),
        _Card("Peak memory", f"{max(line['memory_bytes'] for line in stage.steps) / 2**30:.2f} GiB"),
    ]


def _compared(stage: _Stage) -> dict[str, str]:
    """What evaluations measured, by name, the most telling last."""
    measured = stage.evaluations[0] if stage.evaluations else {}
    return {name: label for name, label in _HELD_OUT.items() if name in measured or name == "eval_loss"}


def _held_out_cards(stage: _Stage) -> list[_Card]:
    names = _compared(stage)
    if not stage.held_out:
        missing = f"{len(stage.evaluations)} of 2 evaluations" if stage.evaluations else "nothing was held out"
        return [_Card(label, "not compared", missing) for label in names.values()]
    pairs = [(label, stage.evaluations[0][key], stage.evaluations[-1][key]) for key, label in names.items()]
    return [_Card(name, f"{_number(old)} → {_number(new)}", _change(old, new, "{}")) for name, old, new in pairs]


def _charts(stage: _Stage) -> list[Chart]:
    if not stage.steps:
        return []
    others = {name: None for line in stage.steps for name in line if name not in _NO_CHART}
    loss = _points(stage.steps, "loss")
    held_out = [Line("held out", "held", _points(stage.evaluations, "eval_loss"))] if stage.evaluations else []
    memory = [(step, value / 2**30) for step, value in _points(stage.steps, "memory_bytes")]
    return [
        chart("Loss", [Line("each step", "raw", loss), Line("smoothed", "smooth", smoothed(loss)), *held_out]),
        *(chart(title, _single(stage, title, key), from_zero=True) for key, title in _CHARTS.items()),
        chart("Memory in GiB", [Line("Memory", "single", memory)], from_zero=True),
        *(chart(name.replace("_", " ").capitalize(), _single(stage, name, name)) for name in others),
    ]


def _single(stage: _Stage, label: str, key: str) -> list[Line]:
    return [Line(label, "single", _points(stage.steps, key))]


def _points(lines: Sequence[Metrics], key: str) -> list[tuple[float, float]]:
    return [(line["step"], line[key]) for line in lines if key in line]


def _recipe_table(recipe: Recipe) -> dict[str, Rows]:
    table = {"run": list(_flat(recipe.model_dump(mode="json", exclude={"stages"})))}
    for index, stage in enumerate(recipe.stages):
        settings = stage.settings.model_dump(mode="json", exclude={"model", "output"})
        table[f"{index:02d}-{stage.word}"] = list(_flat(settings))
    return table


def _manifest_table(path: Path) -> dict[str, Rows]:
    """Sections of the manifest; none before the end of a run, when it is written."""
    manifest = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    tables = {section: values for section, values in manifest.items() if isinstance(values, Mapping)}  # not the recipe
    return {section.replace("_", " "): list(_flat(values)) for section, values in tables.items()}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def _change(before: float, after: float, form: str) -> str:
    """The change in per cent; nothing where it has no meaning."""
    if not (math.isfinite(after) and 0 < before < math.inf):
        return ""
    return form.format(f"{100 * (after / before - 1):+.1f} %".replace("-", "\N{MINUS SIGN}"))


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    return f"{hours} h {minutes % 60:02d} min" if hours else f"{minutes} min {round(seconds) % 60:02d} s"
