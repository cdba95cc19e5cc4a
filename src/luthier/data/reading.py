"""From files to examples, with nothing lost on the way: every row becomes an example or a bad row with its reason.

Unless one is named, each file's format is recognised from its first row whose columns fit one; a row of another shape
further down is reported, not read as something else. Rows are read one by one and only examples are kept.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from luthier.data.examples import Example, Origin
from luthier.data.formats import Task, check_names, map_columns, recognise, to_example
from luthier.data.sources import BadRow, Row, find_files, read_rows
from luthier.data.writing import write_quarantine
from luthier.errors import DataError

__all__ = ["Reading", "read_examples"]

_ROWS_TO_RECOGNISE_FROM = 16


@dataclass(frozen=True, slots=True)
class Reading:
    """What the files held: num_rows = len(examples) + len(bad), always.

    formats: the format of each file by its path; a file without one good row has none.
    """

    examples: list[tuple[Origin, Example]]
    bad: list[BadRow]
    num_rows: int
    formats: dict[str, str]


def read_examples(
    patterns: str | Sequence[str],
    *,
    task: Task | None = "imitate",
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    quarantine: Path | None = None,
) -> Reading:
    """All examples of the files that the patterns name, in file order.

    task: what the rows are for; None takes each file for what its columns say.
    format: a name from FORMATS, or None to recognise it file by file. columns: {canonical: actual} column names.
    on_error: "stop" reads to the end, then raises DataError with the first bad row and the number of all; "skip"
    returns the bad rows beside the examples and writes them to `quarantine` if that is a path. A file that cannot be
    used at all, or whose format is not known, raises DataError either way.
    """
    columns = columns or {}
    check_names(format, columns, task)
    reading = _read(find_files(patterns), task, format, columns)
    if reading.bad and on_error == "stop":
        first = reading.bad[0]
        raise DataError(
            f"{first.origin}: {first.reason}; {len(reading.bad)} of {reading.num_rows} rows are bad: "
            "mend them, or run with --on-error skip to set them aside"
        )
    if quarantine is not None and on_error == "skip":
        write_quarantine(reading.bad, quarantine)
    return reading


def _read(files: Iterable[str], task: Task | None, format: str | None, columns: Mapping[str, str]) -> Reading:
    examples: list[tuple[Origin, Example]] = []
    bad: list[BadRow] = []
    formats: dict[str, str] = {}
    num_rows = 0
    for file in files:
        name, rows = (format, read_rows(file)) if format else _recognised(read_rows(file), task, columns)
        if name:
            formats[file] = name
        for row in rows:
            num_rows += 1
            made = _made(row, name, columns)
            if isinstance(made, BadRow):
                bad.append(made)
            else:
                examples.append((row.origin, made))
    assert num_rows == len(examples) + len(bad)
    return Reading(examples, bad, num_rows, formats)


def _recognised(
    rows: Iterator[Row | BadRow], task: Task | None, columns: Mapping[str, str]
) -> tuple[str | None, Iterator[Row | BadRow]]:
    """The format of the first row that fits one, None where all rows are bad already, and all the rows again."""
    seen: list[Row | BadRow] = []
    refusals: list[str] = []
    for row in rows:
        seen.append(row)
        if isinstance(row, BadRow):
            continue
        try:
            return recognise(map_columns(row.values, columns), task), chain(seen, rows)
        except DataError as error:
            refusals.append(f"{row.origin}: {error}")
        if len(refusals) == _ROWS_TO_RECOGNISE_FROM:
            break
    if refusals:
        raise DataError(refusals[0])
    return None, iter(seen)


def _made(row: Row | BadRow, name: str | None, columns: Mapping[str, str]) -> Example | BadRow:
    if isinstance(row, BadRow):
        return row
    assert name is not None
    try:
        return to_example(map_columns(row.values, columns), name)
    except DataError as error:
        return BadRow(row.origin, str(error), json.dumps(row.values, ensure_ascii=False, default=str))
