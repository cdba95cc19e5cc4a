"""`luthier merge`: an adapter written into its model's weights."""

from pathlib import Path
from typing import get_args

import click

from luthier.adapters.peft_format import read_adapter
from luthier.errors import AdapterError, ModelError
from luthier.models.merge import merge_into
from luthier.models.sources import ResolvedSource, resolve
from luthier.recipe.training import DType

__all__ = ["command"]


def command(word: str) -> click.Command:
    """The command `merge`."""

    @click.command(word, help="Merge an adapter into its model, tensor by tensor.")
    @click.option("--model", help="The model that it was trained on. [default: the one that the adapter names]")
    @click.option("--adapter", required=True, type=click.Path(path_type=Path), help="The adapter's folder.")
    @click.option("--output", required=True, type=click.Path(path_type=Path), help="The folder of the merged model.")
    @click.option("--rank", type=click.IntRange(1), help="The rank to merge at, of a DyLoRA. [default: as saved]")
    @click.option("--dtype", type=click.Choice(get_args(DType)), help="Of the merged weights. [default: as stored]")
    @click.option(
        "--verify/--no-verify",
        default=True,
        show_default=True,
        help="Load the result and compare it with model and adapter, which needs memory for the whole model.",
    )
    def merge(
        model: str | None,
        adapter: Path,
        output: Path,
        rank: int | None,
        dtype: DType | None,
        verify: bool,
    ) -> None:
        source = resolve(model) if model else _base_of(adapter)
        merged = merge_into(source, adapter, output, dtype=dtype, verify=verify, rank=rank)
        click.echo(f"{merged.num_layers} layers merged into {merged.folder}")
        if (proof := merged.certificate) is not None:
            click.echo(
                f"loaded again: KL {proof.kl:.1e} nats a token from model and adapter (bound {proof.kl_bound:.0e}), "
                f"the same likeliest token at {proof.greedy_agreement:.0%} of {proof.num_tokens} positions"
            )

    return merge


def _base_of(adapter: Path) -> ResolvedSource:
    """The model that the adapter names. Raises AdapterError where it names none, or one that is not to be found."""
    name = read_adapter(adapter).base_model
    if not name:
        raise AdapterError(f"{adapter}: does not say what it was trained on; give --model")
    try:
        return resolve(name)
    except ModelError as error:
        raise AdapterError(
            f"{adapter}: was trained on {name}, which is not to be found; give --model ({error})"
        ) from error
