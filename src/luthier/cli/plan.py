"""`luthier plan STAGE`: the memory that a stage will take, and what to change where it does not fit."""

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from luthier.cli.options import settings_of, settings_options
from luthier.pipeline.plan import Change, MemoryPlan, plan_stage
from luthier.recipe.document import load_recipe
from luthier.recipe.stages import STAGE_SETTINGS
from luthier.recipe.training import Training

__all__ = ["command"]

_JSON_HELP = "Print JSON: peak_bytes, its parts, and the change that would make it fit."
_MEMORY_HELP = "Plan for a machine with so much memory, in GB; by default this one."
_POSITIVE = click.FloatRange(min=0, min_open=True)
_TEXT = {
    "process": "Python, libraries, data",
    "weights": "weights and adapter",
    "masters": "float32 masters of the weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations and output layer",
    "rollout": "weights and keys while sampling",
    "allocator": "lost by the allocator",
}


def command(word: str) -> click.Command:
    """The group `plan`: one command a stage, with the stage's own flags, and one for a recipe."""
    group = click.Group(word, help="Say how much memory a stage will take, before anything is loaded.")
    for stage in STAGE_SETTINGS:
        group.add_command(_of_stage(stage))
    group.add_command(_of_recipe())
    return group


def _of_stage(word: str) -> click.Command:
    def run(as_json: bool, memory_gb: float | None, **given: Any) -> None:
        settings = settings_of(STAGE_SETTINGS[word], given)
        _show(*plan_stage(word, settings, settings.model, limit_bytes=_bytes(memory_gb)), settings, as_json)

    parameters = [
        *settings_options(STAGE_SETTINGS[word]),
        click.Option(["--memory-gb"], type=_POSITIVE, help=_MEMORY_HELP),
        click.Option(["--json", "as_json"], is_flag=True, help=_JSON_HELP),
    ]
    return click.Command(word, callback=run, params=[*parameters], help=f"Plan the stage {word}.")


def _of_recipe() -> click.Command:
    @click.command("run", help="Plan every stage of a recipe, each on the recipe's model.")
    @click.argument("recipe", type=click.Path(path_type=Path))
    @click.option("--memory-gb", type=_POSITIVE, help=_MEMORY_HELP)
    @click.option("--json", "as_json", is_flag=True, help=_JSON_HELP)
    def run(recipe: Path, memory_gb: float | None, as_json: bool) -> None:
        read = load_recipe(recipe)
        for stage in read.stages:
            planned = plan_stage(stage.word, stage.settings, read.model, limit_bytes=_bytes(memory_gb))
            _show(*planned, stage.settings, as_json)

    return run


def _bytes(memory_gb: float | None) -> int | None:
    return None if memory_gb is None else int(memory_gb * 1e9)


def _show(plan: MemoryPlan, change: Change | None, settings: Training, as_json: bool) -> None:
    if as_json:
        mend = None if change is None else {"set": change.words, "peak_bytes": change.plan.peak_bytes}
        click.echo(json.dumps({**plan.as_dict(), "change": mend}))
        return
    console = Console(highlight=False)
    table = Table("what", "MB", title=f"{settings.model}, {settings.dtype}", title_justify="left")
    table.columns[1].justify = "right"
    for name, size in plan.parts.items():
        if size:
            table.add_row(_TEXT[name], f"{size / 1e6:,.0f}")
    table.add_row("loading, before the first step", f"({plan.loading_bytes / 1e6:,.0f})")
    table.add_row("at the worst moment", f"[bold]{plan.peak_bytes / 1e6:,.0f}", end_section=True)
    console.print(table)
    console.print(
        f"micro-batches of up to {plan.micro_batch_tokens:,} tokens; the largest of this data has "
        f"{plan.largest_tokens:,}"
    )
    if plan.offloaded_bytes:
        console.print(
            f"offload_optimizer: {settings.offload_optimizer} takes {plan.offloaded_bytes / 1e9:.1f} GB, of "
            f"{plan.offloaded_room_bytes / 1e9:.1f} GB that are free there"
        )
    if plan.fits:
        console.print(f"[green]fits[/]: {plan.available_bytes / 1e9:.1f} GB are there")
    else:
        console.print(f"[bold red]does not fit[/]: {plan.sentence(change)}")
