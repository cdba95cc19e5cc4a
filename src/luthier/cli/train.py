"""One command for each training stage: `luthier sft --data rows.jsonl` is a recipe with that one stage."""

from typing import Any

import click

from luthier.cli.options import settings_of, settings_options
from luthier.cli.run import run_on_screen
from luthier.pipeline.stages import STAGES
from luthier.recipe.document import recipe_of
from luthier.recipe.stages import STAGE_SETTINGS

__all__ = ["command"]


def command(word: str) -> click.Command:
    """The command of a stage's word, which has dashes here and underscores in recipes."""
    word = word.replace("-", "_")

    def run(**given: Any) -> None:
        run_on_screen(recipe_of(word, settings_of(STAGE_SETTINGS[word], given)))

    return click.Command(
        word, callback=run, params=[*settings_options(STAGE_SETTINGS[word])], help=STAGES[word].summary
    )
