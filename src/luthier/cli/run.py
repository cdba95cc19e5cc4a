"""`luthier run recipe.yaml`: all stages of a recipe, on from where they stopped."""

from pathlib import Path

import click
from rich.console import Console

from luthier.cli.progress import Screen, show_summary
from luthier.pipeline.run import run_recipe
from luthier.recipe.document import Recipe, load_recipe

__all__ = ["command", "run_on_screen"]


def command(word: str) -> click.Command:
    """The command `run`."""

    @click.command(word, help="Run a recipe, or go on with it where it stopped.")
    @click.argument("recipe", type=click.Path(path_type=Path))
    def run(recipe: Path) -> None:
        run_on_screen(load_recipe(recipe))

    return run


def run_on_screen(recipe: Recipe) -> None:
    """Runs a recipe and shows it."""
    console = Console()
    titles = [f"{index:02d}-{stage.word}" for index, stage in enumerate(recipe.stages)]
    summaries = run_recipe(recipe, listeners=lambda index, stage: [Screen(console, titles[index])])
    for title, summary in zip(titles, summaries, strict=True):
        show_summary(console, title, summary)
    console.print(f"model: {Path(recipe.output) / 'model'}")
