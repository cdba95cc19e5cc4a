"""`luthier models`: the models that have a short name."""

import click
from rich.console import Console
from rich.table import Table

from luthier.models.sources import catalogue

__all__ = ["command"]


def command(word: str) -> click.Command:
    """The command `models`."""

    @click.command(word, help="List the models that have a short name.")
    def models() -> None:
        table = Table("name", "parameters", "licence", "size", "in the cache")
        for entry in catalogue():
            size = f"{entry.size_bytes / 1e6:.0f} MB"
            table.add_row(
                entry.alias, f"{entry.num_parameters / 1e6:.0f}M", entry.licence, size, "yes" if entry.cached else "no"
            )
        Console().print(table)

    return models
