"""`luthier run recipe.yaml`: all stages of a recipe, on from where they stopped."""

import json
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from luthier.cli.progress import Screen, show_summary
from luthier.pipeline.reproduce import reproduce
from luthier.pipeline.run import Listeners, run_recipe
from luthier.pipeline.train import Summary
from luthier.recipe.document import Recipe, load_recipe, recipe_schema
from luthier.training.stopping import Stop

__all__ = ["command", "run_on_screen"]


def command(word: str) -> click.Command:
    """The command `run`."""

    @click.command(word, help="Run a recipe, or go on with it where it stopped.")
    @click.argument("recipe", type=click.Path(path_type=Path), required=False)
    @click.option(
        "--from-manifest", type=click.Path(path_type=Path), help="Have the run of this manifest.json once more."
    )
    @click.option(
        "--output", help="The folder of the run that is had once more; by default the first one's, with -again."
    )
    @click.option(
        "--schema",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_print_schema,
        help="Print the JSON Schema of recipes, for editors, and end.",
    )
    def run(recipe: Path | None, from_manifest: Path | None, output: str | None) -> None:
        if (recipe is None) == (from_manifest is None):
            raise click.UsageError("name a recipe, or a manifest with --from-manifest")
        if recipe is not None and output is not None:
            raise click.UsageError("--output goes with --from-manifest; a recipe says its own")
        if recipe is not None:
            run_on_screen(load_recipe(recipe))
        elif from_manifest is not None:
            _run_once_more(from_manifest, output)

    return run


def _print_schema(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(json.dumps(recipe_schema(), indent=1))
        ctx.exit()


def run_on_screen(recipe: Recipe) -> list[Summary]:
    """Runs a recipe and shows it. Returns what each stage did."""
    console = Console()
    summaries = run_recipe(recipe, listeners=_listeners(console))
    _show(console, recipe, summaries)
    return summaries


def _run_once_more(manifest: Path, output: str | None) -> None:
    console = Console()
    recipe, summaries, different = reproduce(manifest, output=output, listeners=_listeners(console))
    _show(console, recipe, summaries)
    verdict = (
        f"other bytes than the first time: {', '.join(different)}" if different else "the same bytes as the first time"
    )
    console.print(verdict, markup=False)


def _listeners(console: Console) -> Listeners:
    """A stage's screen, and whoever hears of signals."""
    context = click.get_current_context(silent=True)  # none where a script shows a run, as the demo does
    stop = (context and context.find_object(Stop)) or Stop()
    return lambda index, stage: [Screen(console, f"{index:02d}-{stage.word}"), stop]


def _show(console: Console, recipe: Recipe, summaries: Sequence[Summary]) -> None:
    for index, (stage, summary) in enumerate(zip(recipe.stages, summaries, strict=True)):
        show_summary(console, f"{index:02d}-{stage.word}", summary)
    console.print(f"model: {Path(recipe.output) / 'model'}", markup=False)
