"""From files to rows.

A row is a dictionary of columns with the place where it stands. What can go wrong with one row makes a `BadRow` that
says why; what makes a whole file useless (it is cut short, it is not text, it holds nothing) is a `DataError`.
Files are read line by line or batch by batch; only a JSON array is held whole. Lines end at a line feed alone, because
the other characters that Unicode calls line ends are allowed inside a JSON string. Blank lines are not rows.
"""

import csv
import difflib
import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from luthier.data.examples import Origin
from luthier.data.strict_json import describe, parse_json
from luthier.errors import DataError

__all__ = ["BadRow", "Row", "find_files", "read_rows"]

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_MAX_CELL_CHARACTERS = 2**30  # csv refuses cells over 131,072 characters by itself; documents are longer
_PARQUET_BATCH_ROWS = 256


@dataclass(frozen=True, slots=True)
class Row:
    """The columns of one row, by name, as the file has them."""

    values: dict[str, Any]
    origin: Origin


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used: where it stands, why, and its text as far as it can be shown."""

    origin: Origin
    reason: str
    raw: str


def read_rows(patterns: str | Sequence[str]) -> Iterator[Row | BadRow]:
    """Every row of every file that the patterns name, in a stable order, good or bad.

    JSON (an array or one object), JSON lines, CSV, TSV, Parquet, and plain text (a file is one row with a column
    `text`), each also as .gz. A .json file whose first line is a whole object is read as JSON lines.
    Raises DataError where a pattern matches nothing or a file cannot be used at all.
    """
    return chain.from_iterable(map(_read_file, find_files(patterns)))


def find_files(patterns: str | Sequence[str]) -> list[str]:
    """The files that paths, folders (with all below them) and globs (`**` too) name: sorted within each, each once.

    Hidden files are left out of folders and globs. Raises DataError where one matches nothing or no reader is known.
    """
    found: dict[str, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found.update(dict.fromkeys(_matches(pattern)))
    if not found:
        raise DataError("no data file is named; give a path, a folder or a pattern such as data/*.jsonl")
    for path in found:
        if _suffix(path) not in _READERS:
            known = ", ".join(sorted(_READERS))
            raise DataError(f"{path}: this kind of file cannot be read; known are {known}, each also as .gz")
    return list(found)


def _matches(pattern: str) -> list[str]:
    path = os.path.expanduser(pattern)
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        return _files_below(path)
    files = sorted(match for match in glob.glob(path, recursive=True) if os.path.isfile(match))
    if not files:
        raise DataError(f'"{pattern}" matches no file in {os.getcwd()}{_similar(path)}')
    return files


def _files_below(folder: str) -> list[str]:
    below = os.path.join(glob.escape(folder), "**", "*")
    files = sorted(match for match in glob.glob(below, recursive=True) if os.path.isfile(match))
    if not files:
        raise DataError(f"{folder}: the folder holds no files")
    prose = [path for path in files if _READERS.get(_suffix(path)) is _read_text]
    if prose and len(prose) < len(files):
        raise DataError(f"{folder}: holds tables and plain text ({prose[0]}); say which by a pattern such as *.jsonl")
    return files


def _similar(path: str) -> str:
    folder = os.path.dirname(path) or "."
    names = os.listdir(folder) if os.path.isdir(folder) else []
    near = difflib.get_close_matches(os.path.basename(path), names, n=1)
    return f'; is "{near[0]}" meant?' if near else "; check the path"


def _suffix(path: str) -> str:
    name = os.path.basename(path).lower().removesuffix(".gz")
    return os.path.splitext(name)[1]


def _read_file(path: str) -> Iterator[Row | BadRow]:
    num_rows = 0
    try:
        with _open(path) as stream:
            for row in _READERS[_suffix(path)](path, stream):
                num_rows += 1
                yield row
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        detail = str(error).split("\n")[0].strip() or type(error).__name__
        raise DataError(f"{path}: cannot be read after {num_rows} rows ({detail}); is the file whole?") from error
    if num_rows == 0:
        raise DataError(f"{path}: holds no rows; fill the file or leave it out")


def _open(path: str) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.lower().endswith(".gz") else open(path, "rb")


def _read_json(file: str, stream: IO[bytes]) -> Iterator[Row | BadRow]:
    data = _without_mark(file, stream.read())
    if _is_object(data.lstrip().split(b"\n", 1)[0]):
        yield from _read_json_lines(file, io.BytesIO(data))
    elif data.strip():
        value = _parse_document(file, data)
        for index, item in enumerate(value if isinstance(value, list) else [value], start=1):
            yield _row(item, Origin(file, index))


def _parse_document(file: str, data: bytes) -> Any:
    try:
        return parse_json(data.decode())
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{file}:{line}: is not valid UTF-8; save the file as UTF-8") from None
    except DataError as error:
        raise DataError(f"{file}: {error}; a file with one object a line is best named .jsonl") from None


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line.decode()), dict)
    except (UnicodeDecodeError, DataError):
        return False


def _read_json_lines(file: str, stream: IO[bytes]) -> Iterator[Row | BadRow]:
    for number, line in enumerate(_lines(file, stream), start=1):
        if not line.strip():
            continue
        origin = Origin(file, number)
        try:
            yield _row(parse_json(line.decode().rstrip("\r\n")), origin)
        except UnicodeDecodeError as error:
            yield BadRow(origin, f"is not valid UTF-8 at byte {error.start + 1} of the line", _shown(line))
        except DataError as error:
            yield BadRow(origin, str(error), _shown(line))


def _row(value: Any, origin: Origin) -> Row | BadRow:
    if isinstance(value, dict):
        return Row(value, origin)
    reason = f"is {describe(value)}, not an object with named columns"
    return BadRow(origin, reason, json.dumps(value, ensure_ascii=False))


def _read_csv(file: str, stream: IO[bytes], *, delimiters: str = ",;\t") -> Iterator[Row | BadRow]:
    """Cells parted by the delimiter that the header has most of; the first record names the columns."""
    # surrogateescape: a bad byte spoils its own record, not the reading of all that follow
    lines = (line.decode(errors="surrogateescape") for line in _lines(file, stream))
    first = next(lines, "")
    records = _csv_records(chain([first], lines), delimiter=max(delimiters, key=first.count))
    header = _header(file, next(records, None))
    for line, raw, cells in records:
        origin = Origin(file, line)
        if isinstance(cells, str):
            yield BadRow(origin, cells, _shown(raw.encode(errors="surrogateescape")))
        elif len(cells) != len(header):
            reason = f"has {len(cells)} cells where the header has {len(header)}; quote cells that hold separators"
            yield BadRow(origin, reason, raw.rstrip("\r\n"))
        else:
            yield Row(dict(zip(header, cells, strict=True)), origin)


def _csv_records(lines: Iterator[str], *, delimiter: str) -> Iterator[tuple[int, str, list[str] | str]]:
    """(first line, raw text, cells or else what is wrong) of each record."""
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    taken: list[str] = []
    reader = csv.reader(_taking(lines, taken), delimiter=delimiter, strict=True)
    line = 1
    while True:
        cells: list[str] | str
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            unclosed = "unexpected end" in str(error)
            cells = "opens a quote that is never closed" if unclosed else f"is not valid CSV: {error}"
        raw = "".join(taken)
        if not _is_utf8(raw):
            cells = "is not valid UTF-8"
        if cells:
            yield line, raw, cells
        line += len(taken)
        taken.clear()


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _taking(lines: Iterator[str], taken: list[str]) -> Iterator[str]:
    for line in lines:
        taken.append(line)
        yield line


def _header(file: str, record: tuple[int, str, list[str] | str] | None) -> list[str]:
    if record is None:
        return []
    line, _, cells = record
    if isinstance(cells, str):
        raise DataError(f"{file}:{line}: the header {cells}")
    names = [cell.strip() for cell in cells]
    _check_names_differ(file, names)
    return names


def _check_names_differ(file: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f'{file}: two columns are named "{twice[0][:40]}"; rename one')


def _read_parquet(file: str, stream: IO[bytes]) -> Iterator[Row | BadRow]:
    table = pq.ParquetFile(stream)
    _check_names_differ(file, table.schema_arrow.names)
    number = 0
    for batch in table.iter_batches(batch_size=_PARQUET_BATCH_ROWS):
        for index in range(batch.num_rows):
            number += 1
            try:
                yield Row(batch.slice(index, 1).to_pylist()[0], Origin(file, number))
            except (ValueError, OverflowError) as error:  # bytes that are not UTF-8, dates beyond Python's
                yield BadRow(Origin(file, number), f"holds a value that cannot be read: {error}", raw="")


def _read_text(file: str, stream: IO[bytes]) -> Iterator[Row | BadRow]:
    data = _without_mark(file, stream.read())
    try:
        text = data.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        yield BadRow(Origin(file, line), "is not valid UTF-8; save the file as UTF-8", _shown(data))
        return
    if text.strip():
        yield Row({"text": text}, Origin(file, 1))


def _lines(file: str, stream: IO[bytes]) -> Iterator[bytes]:
    first = next(stream, b"")
    return chain([_without_mark(file, first)], stream)


def _without_mark(file: str, data: bytes) -> bytes:
    if data.startswith(_UTF16_MARKS):
        raise DataError(f"{file}: is UTF-16; save the file as UTF-8")
    return data.removeprefix(_BYTE_ORDER_MARK)


def _shown(data: bytes) -> str:
    return data.decode(errors="backslashreplace").rstrip("\r\n")


_READERS: dict[str, Callable[[str, IO[bytes]], Iterator[Row | BadRow]]] = {
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".md": _read_text,
    ".ndjson": _read_json_lines,
    ".parquet": _read_parquet,
    ".tsv": partial(_read_csv, delimiters="\t"),
    ".txt": _read_text,
}
