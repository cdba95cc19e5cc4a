"""`luthier run recipe.yaml`: all stages of a recipe, on from where they stopped."""

import json
from pathlib import Path

import click
from rich.console import Console

from luthier.cli.progress import Screen, show_summary
from luthier.pipeline.run import run_recipe
from luthier.pipeline.train import Summary
from luthier.recipe.document import Recipe, load_recipe, recipe_schema

__all__ = ["command", "run_on_screen"]


def command(word: str) -> click.Command:
    """The command `run`."""

    @click.command(word, help="Run a recipe, or go on with it where it stopped.")
    @click.argument("recipe", type=click.Path(path_type=Path))
    @click.option(
        "--schema",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_print_schema,
        help="Print the JSON Schema of recipes, for editors, and end.",
    )
    def run(recipe: Path) -> None:
        run_on_screen(load_recipe(recipe))

    return run


def _print_schema(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(json.dumps(recipe_schema(), indent=1))
        ctx.exit()


def run_on_screen(recipe: Recipe) -> list[Summary]:
    """Runs a recipe and shows it. Returns what each stage did."""
    console = Console()
    titles = [f"{index:02d}-{stage.word}" for index, stage in enumerate(recipe.stages)]
    summaries = run_recipe(recipe, listeners=lambda index, stage: [Screen(console, titles[index])])
    for title, summary in zip(titles, summaries, strict=True):
        show_summary(console, title, summary)
    console.print(f"model: {Path(recipe.output) / 'model'}", markup=False)
    return summaries
