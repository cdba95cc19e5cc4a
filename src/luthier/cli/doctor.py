"""`luthier doctor`: the machine, recipes and data looked at before hours are spent."""

from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from luthier.pipeline.doctor import Finding, Machine, check_data, check_machine, check_recipe

__all__ = ["command"]

_MARKS = {"good": ("ok", "green"), "warning": ("look", "yellow"), "problem": ("mend", "bold red")}


def command(word: str) -> click.Command:
    """The command `doctor`."""

    @click.command(word, help="Look for what would spoil a run: on this machine, in recipes (.yaml) and in data files.")
    @click.argument("files", nargs=-1, type=click.Path(path_type=Path))
    def run(files: tuple[Path, ...]) -> None:
        found = check_machine(Machine.here())
        for file in files:
            found += check_recipe(file) if file.suffix in (".yaml", ".yml") else check_data(file)
        console = Console(soft_wrap=True)
        for finding in found:
            console.print(_line(finding))
        if any(finding.level == "problem" for finding in found):
            raise click.exceptions.Exit(1)

    return run


def _line(finding: Finding) -> Text:
    mark, style = _MARKS[finding.level]
    line = Text.assemble((f"{mark:5}", style), finding.what)
    return line.append(f"; {finding.change}") if finding.change else line
