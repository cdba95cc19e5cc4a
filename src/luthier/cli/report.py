"""`luthier report`: the page of a run, written from its folder."""

from pathlib import Path

import click

from luthier.pipeline.report import write_report

__all__ = ["command"]


def command(word: str) -> click.Command:
    """The command `report`."""

    @click.command(word, help="Write a run's report.html, also while the run is going.")
    @click.argument("folder", type=click.Path(path_type=Path))
    def report(folder: Path) -> None:
        click.echo(write_report(folder))

    return report
