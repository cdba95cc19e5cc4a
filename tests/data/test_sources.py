"""Every kind of file gives its rows, and every way in which one can be broken gives one sentence that says where."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from luthier.data.sources import BadRow, Row, find_files, read_rows
from luthier.errors import DataError

ROWS = [{"question": "Why?", "answer": "Because.\nReally."}, {"question": "Où?", "answer": 'Là, "ici" 🎻'}]


def write(path: Path, data: bytes | str) -> str:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def as_lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_csv(path: Path, delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["question", "answer"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def good(path: str) -> list[dict[str, object]]:
    rows = list(read_rows(path))
    assert all(isinstance(row, Row) for row in rows), rows
    return [row.values for row in rows if isinstance(row, Row)]


def only_bad(path: str) -> list[BadRow]:
    return [row for row in read_rows(path) if isinstance(row, BadRow)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "A.JSONL", "a.json", "a.jsonl.gz"])
def test_json_lines_are_read_under_every_name(tmp_path: Path, name: str) -> None:
    data = as_lines(ROWS)
    assert good(write(tmp_path / name, gzip.compress(data) if name.endswith(".gz") else data)) == ROWS


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_and_a_lone_object_are_read(tmp_path: Path, indent: int | None) -> None:
    array = write(tmp_path / "array.json", json.dumps(ROWS, indent=indent))
    assert good(array) == ROWS
    assert [row.origin.line for row in read_rows(array)] == [1, 2]
    assert good(write(tmp_path / "one.json", json.dumps(ROWS[0], indent=indent))) == ROWS[:1]


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t")])
def test_csv_is_read_with_quoted_line_breaks_and_its_own_delimiter(tmp_path: Path, name: str, delimiter: str) -> None:
    write_csv(tmp_path / name, delimiter)
    assert good(str(tmp_path / name)) == ROWS
    assert [row.origin.line for row in read_rows(str(tmp_path / name))] == [2, 4]  # the first row takes two lines


def test_a_csv_cell_may_be_longer_than_the_csv_module_allows_by_itself(tmp_path: Path) -> None:
    long = "x" * 200_000
    assert good(write(tmp_path / "a.csv", f"id,text\n1,{long}\n")) == [{"id": "1", "text": long}]


def test_parquet_is_read_across_batches_and_nested(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"number {i}"}], "id": i} for i in range(600)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert good(str(tmp_path / "a.parquet")) == rows
    assert [row.origin.line for row in read_rows(str(tmp_path / "a.parquet"))] == list(range(1, 601))


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz"])
def test_a_text_file_is_one_row(tmp_path: Path, name: str) -> None:
    data = b"Erste Zeile\r\n\r\nzweite\n"
    path = write(tmp_path / name, gzip.compress(data) if name.endswith(".gz") else data)
    assert good(path) == [{"text": "Erste Zeile\n\nzweite\n"}]


def test_marks_blank_lines_and_carriage_returns_change_nothing(tmp_path: Path) -> None:
    data = b"\xef\xbb\xbf" + as_lines(ROWS).replace(b"\n", b"\r\n\r\n")
    path = write(tmp_path / "a.jsonl", data)
    assert good(path) == ROWS
    assert [row.origin.line for row in read_rows(path)] == [1, 3]
    assert good(write(tmp_path / "a.csv", b"\xef\xbb\xbfquestion,answer\r\nWhy?,So\r\n")) == [
        {"question": "Why?", "answer": "So"}
    ]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_only_a_line_feed_ends_a_line_of_json(tmp_path: Path, separator: str) -> None:
    rows = [{"text": f"one{separator}two"}, {"text": "three"}]
    assert good(write(tmp_path / "a.jsonl", as_lines(rows))) == rows


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1', "is not valid JSON"),
        (b'{"a": NaN}', "holds NaN, which is not JSON"),
        (b'{"a": -Infinity}', "holds -Infinity, which is not JSON"),
        (b'{"a": 1e999}', "holds the number 1e999, which is too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "holds an integer of thousands of digits"),
        (b'{"a": 1, "b": 2, "a": 3}', 'has the key "a" twice in one object'),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "is nested deeper than 100 levels"),
        (b'{"a": ' + b"[" * 100_000, "is nested deeper than 100 levels"),
        (b'{"a": "\xff"}', "is not valid UTF-8 at byte 8 of the line"),
        (b'{"a": "\x01"}', "is not valid JSON: Invalid control character"),
        (b"[1, 2]", "is a list, not an object with named columns"),
        (b'{"a": 1} {"a": 2}', "is not valid JSON: Extra data"),
    ],
)
def test_a_line_that_is_not_strict_json_is_one_bad_row(tmp_path: Path, line: bytes, reason: str) -> None:
    path = write(tmp_path / "a.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    first, bad, last = read_rows(path)
    assert isinstance(first, Row)
    assert isinstance(last, Row)
    assert isinstance(bad, BadRow)
    assert (str(bad.origin), bad.reason[: len(reason)]) == (f"{path}:2", reason)


def test_ragged_and_undecodable_csv_records_are_bad_rows_and_the_rest_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'q,a\n1,"x\ny"\n1,2,3\n4\n5,\xff\n6,7\n')
    assert [(bad.origin.line, bad.reason.split(";")[0]) for bad in only_bad(path)] == [
        (4, "has 3 cells where the header has 2"),
        (5, "has 1 cells where the header has 2"),
        (6, "is not valid UTF-8"),
    ]
    assert [row.values["a"] for row in read_rows(path) if isinstance(row, Row)] == ["x\ny", "7"]


def test_a_quote_that_is_never_closed_is_reported_where_it_opens(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'q,a\n1,2\n3,"four\n5,6\n')
    assert only_bad(path)[0] == BadRow(only_bad(path)[0].origin, "opens a quote that is never closed", '3,"four\n5,6')
    assert only_bad(path)[0].origin.line == 3


def test_a_text_file_that_is_not_utf8_names_the_line(tmp_path: Path) -> None:
    (bad,) = only_bad(write(tmp_path / "a.txt", b"good\nb\xe4d\n"))
    assert (bad.origin.line, bad.raw) == (2, "good\nb\\xe4d")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"", "holds no rows"),
        ("a.jsonl", b"\n \n", "holds no rows"),
        ("a.json", b"[]", "holds no rows"),
        ("a.csv", b"q,a\n", "holds no rows"),
        ("a.csv", b"", "holds no rows"),
        ("a.txt", b" \n", "holds no rows"),
        ("a.json", b'[{"a": 1},', "is not valid JSON"),
        ("a.json", b'[{"a": 1},\n{"a": "\xff"}]', r"a\.json:2: is not valid UTF-8"),
        ("a.jsonl", "{}".encode("utf-16"), "is UTF-16; save the file as UTF-8"),
        ("a.csv", b"q,q\n1,2\n", 'two columns are named "q"'),
        ("a.csv", b'q,"a', "the header opens a quote that is never closed"),
        ("a.parquet", b"PAR1 no", "cannot be read after 0 rows"),
        ("a.parquet", b"", "cannot be read after 0 rows"),
        ("a.jsonl.gz", b"not gzip", "cannot be read after 0 rows"),
        ("a.pdf", b"%PDF", "this kind of file cannot be read; known are"),
        ("noname", b"{}", "this kind of file cannot be read; known are"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_reason(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    path = write(tmp_path / name, data)
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows(path))
    assert str(caught.value).startswith(path)


@pytest.mark.parametrize("cut", [30, -9, -4])
def test_a_gzip_file_cut_short_is_refused_wherever_it_is_cut(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(as_lines(ROWS * 50))[:cut])
    with pytest.raises(DataError, match=r"cannot be read after \d+ rows"):
        list(read_rows(path))


@pytest.mark.parametrize("cut", [4, 100, -1])
def test_a_parquet_file_cut_short_is_refused(tmp_path: Path, cut: int) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "whole.parquet")
    path = write(tmp_path / "a.parquet", (tmp_path / "whole.parquet").read_bytes()[:cut])
    with pytest.raises(DataError, match="cannot be read after 0 rows"):
        list(read_rows(path))


def test_globs_folders_and_home_are_followed_in_a_stable_order_and_each_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ["b.jsonl", "a.jsonl", "deep/er/c.jsonl", "[x].jsonl", ".hidden.jsonl"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, as_lines(ROWS))
    everything = [str(tmp_path / name) for name in ["[x].jsonl", "a.jsonl", "b.jsonl", "deep/er/c.jsonl"]]
    assert find_files(str(tmp_path)) == everything
    assert find_files("~/**/*.jsonl") == everything
    assert find_files([str(tmp_path / "b.jsonl"), "~/*.jsonl"]) == [everything[2], everything[0], everything[1]]
    assert find_files(str(tmp_path / "[x].jsonl")) == everything[:1]


def test_a_name_that_matches_nothing_is_refused_with_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", as_lines(ROWS))
    with pytest.raises(DataError, match=r'trian\.jsonl" matches no file .* is "train\.jsonl" meant\?'):
        find_files(str(tmp_path / "trian.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the folder holds no files"):
        find_files(str(tmp_path / "empty"))
    with pytest.raises(DataError, match="no data file is named"):
        find_files([])


def test_a_readme_beside_tables_is_not_read_as_a_training_text(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", as_lines(ROWS))
    write(tmp_path / "README.md", "About this set")
    with pytest.raises(DataError, match=r"holds tables and plain text .*README\.md"):
        find_files(str(tmp_path))
    assert len(find_files(str(tmp_path / "*.jsonl"))) == 1
