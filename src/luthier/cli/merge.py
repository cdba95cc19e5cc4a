"""`luthier merge`: an adapter written into its model's weights."""

from pathlib import Path

import click
from rich.console import Console

from luthier.adapters.merge import merge_adapters
from luthier.adapters.peft_format import load_adapter
from luthier.models.load import load
from luthier.models.save import save

__all__ = ["command"]


def command(word: str) -> click.Command:
    """The command `merge`."""

    @click.command(word, help="Merge an adapter into its model.")
    @click.option("--model", default="smollm2-135m", show_default=True, help="The model that it was trained on.")
    @click.option("--adapter", required=True, type=click.Path(path_type=Path), help="The adapter's folder.")
    @click.option("--output", required=True, type=click.Path(path_type=Path), help="The folder of the merged model.")
    def merge(model: str, adapter: Path, output: Path) -> None:
        loaded = load(model)
        load_adapter(loaded.network, adapter)
        count = merge_adapters(loaded.network)
        place = save(loaded, output)
        Console().print(f"{count} layers merged into {place}")

    return merge
