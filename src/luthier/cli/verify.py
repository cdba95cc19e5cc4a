"""`luthier verify`: promises shown on the user's own recipe; exit code 1 and the numbers where one does not hold."""

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from luthier.pipeline.verify_loss import GRADIENT_BOUND, verify_loss
from luthier.pipeline.verify_resume import verify_resume
from luthier.pipeline.verify_template import verify_template
from luthier.recipe.document import load_recipe

__all__ = ["command"]

_RECIPE = click.argument("recipe", type=click.Path(path_type=Path))


def command(word: str) -> click.Command:
    """The group `verify`."""
    group = click.Group(word, no_args_is_help=False, help="Show on your own recipe that Luthier keeps its promises.")
    for subcommand in (loss, resume, template):
        group.add_command(subcommand)
    return group


@click.command()
@_RECIPE
@click.option("--steps", default=8, show_default=True, type=click.IntRange(2), help="Sequences in the step.")
def loss(recipe: Path, steps: int) -> None:
    """Show that a step's gradient does not depend on how the step is cut."""
    proof = verify_loss(load_recipe(recipe), num_sequences=steps)
    console = Console()
    console.print(
        f"one step of {proof.num_sequences} sequences, {proof.num_tokens:,} tokens, "
        f"{proof.num_trained_tokens:,} of them trained, in float64 without dropout"
    )
    table = Table("computed", "micro-batches", "loss", "gradient differs by")
    for result in (*proof.cuts, proof.averaged):
        table.add_row(result.name, str(result.num_micro_batches), f"{result.loss:.6f}", f"{result.difference:.1e}")
    console.print(table)
    console.print(f"every cut gives the same gradient to {proof.largest_difference:.1e} (bound {GRADIENT_BOUND:.0e})")
    console.print('"means averaged" is what dividing each micro-batch by its own tokens would have given')


@click.command()
@_RECIPE
@click.option("--steps", default=4, show_default=True, type=click.IntRange(2), help="Optimizer steps of each run.")
def resume(recipe: Path, steps: int) -> None:
    """Show that a run that is stopped and goes on ends as one that was not stopped."""
    proof = verify_resume(load_recipe(recipe), num_steps=steps)
    Console().print(
        f"{proof.num_steps} steps, stopped and gone on from step {proof.resumed_after}: {proof.num_parameters} trained "
        f"parameters and {proof.num_optimizer_tensors} tensors of the optimizer are the same, bit for bit"
    )


@click.command()
@click.argument("recipe_or_model")
@click.option("--model", type=click.Path(path_type=Path), help="A model saved before, to compare with.")
def template(recipe_or_model: str, model: Path | None) -> None:
    """Show that what is trained is what is served, here and by others' tools."""
    is_recipe = Path(recipe_or_model).suffix in (".yaml", ".yml")
    proof = verify_template(load_recipe(recipe_or_model) if is_recipe else recipe_or_model, saved=model)
    console = Console(highlight=False)
    console.print(
        f"{proof.num_conversations} conversations, {proof.num_turns} trained turns: each begins exactly as the prompt "
        f"that is served, and ends with {' or '.join(proof.stop_tokens)}, where generation stops",
        markup=False,
    )
    console.print(
        f"the saved model gives the same ids; transformers alone does for {proof.num_compared}, and "
        f"{proof.num_with_markers} were not compared there, since their text spells turn markers"
    )
    for reason in proof.refused:
        console.print(f"refused: {reason}", markup=False)
