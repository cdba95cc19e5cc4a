"""`luthier merge`: an adapter written into its model's weights."""

from pathlib import Path
from typing import Literal

import click

from luthier.models.merge import merge_into
from luthier.models.sources import resolve

__all__ = ["command"]


def command(word: str) -> click.Command:
    """The command `merge`."""

    @click.command(word, help="Merge an adapter into its model, tensor by tensor.")
    @click.option("--model", default="smollm2-135m", show_default=True, help="The model that it was trained on.")
    @click.option("--adapter", required=True, type=click.Path(path_type=Path), help="The adapter's folder.")
    @click.option("--output", required=True, type=click.Path(path_type=Path), help="The folder of the merged model.")
    @click.option("--dtype", type=click.Choice(["bf16", "fp32"]), help="Of the merged weights. [default: as stored]")
    @click.option(
        "--verify/--no-verify",
        default=True,
        show_default=True,
        help="Load the result and compare it with model and adapter, which needs memory for the whole model.",
    )
    def merge(model: str, adapter: Path, output: Path, dtype: Literal["bf16", "fp32"] | None, verify: bool) -> None:
        merged = merge_into(resolve(model), adapter, output, dtype=dtype, verify=verify)
        click.echo(f"{merged.num_layers} layers merged into {merged.folder}")
        if (proof := merged.certificate) is not None:
            click.echo(
                f"loaded again: KL {proof.kl:.1e} nats a token from model and adapter (bound {proof.kl_bound:.0e}), "
                f"the same likeliest token at {proof.greedy_agreement:.0%} of {proof.num_tokens} positions"
            )

    return merge
