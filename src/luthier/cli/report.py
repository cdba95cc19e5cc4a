"""`luthier report`: the page of a run, or several runs beside one another, written from their folders."""

import json
from pathlib import Path

import click
from rich import box
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from luthier.pipeline.compare import Comparison, Table, compare, write_comparison
from luthier.pipeline.report import write_report

__all__ = ["command"]

_OUTPUT_HELP = "Where the page goes; by default report.html in the run, of several comparison.html beside the first."
_JSON_HELP = "Print what came of each stage, and settings that differ, as JSON; a page only where --output says."


def command(word: str) -> click.Command:
    """The command `report`."""

    @click.command(word, help="Write a run's report.html, also while the run is going; compare several runs.")
    @click.argument("folders", metavar="RUN...", type=click.Path(path_type=Path), nargs=-1, required=True)
    @click.option("--output", type=click.Path(path_type=Path), help=_OUTPUT_HELP)
    @click.option("--json", "as_json", is_flag=True, help=_JSON_HELP)
    def report(folders: tuple[Path, ...], output: Path | None, as_json: bool) -> None:
        if len(folders) == 1 and not as_json:
            click.echo(write_report(folders[0], output=output))
            return
        comparison = compare(folders)
        if as_json:
            click.echo(json.dumps(comparison.as_dict(), allow_nan=False))
        else:
            _show(comparison)
        if output is not None or not as_json:
            page = _page(comparison, folders, output)
            click.echo(page, err=as_json)

    return report


def _page(comparison: Comparison, folders: tuple[Path, ...], output: Path | None) -> Path:
    """Writes the page of one run or of several; by default beside the first run."""
    if len(folders) == 1:
        return write_report(folders[0], output=output)
    return write_comparison(comparison, output or folders[0].absolute().parent / "comparison.html")


def _show(comparison: Comparison) -> None:
    console = Console(highlight=False)
    differing = comparison.differing()
    if not differing.rows:
        console.print("all settings are the same")
    for table in [differing, *map(comparison.measured, comparison.words)]:
        if table.rows:
            console.print(_grid(table, comparison.names))


def _grid(table: Table, names: list[str]) -> Grid:
    grid = Grid(title=Text(table.title), title_justify="left", box=box.SIMPLE_HEAD)
    grid.add_column("")
    for name in names:
        grid.add_column(Text(name), justify="right", overflow="fold")
    for name, cells in table.rows:
        grid.add_row(Text(name), *map(Text, cells))
    return grid
