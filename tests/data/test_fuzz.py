"""Hundreds of corrupted variants of real files: each gives a DataError sentence, or every row is used or reported.

The number of rows is counted here by itself, on the bytes of the damaged file.
"""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.data.reading import Reading, read_examples
from luthier.errors import DataError

FILES = ["alpaca_en", "dpo_en_sharegpt", "glaive_toolcall_en", "gsm8k_train", "kto_en_sharegpt"]
NUM_ROWS = 30
GARBAGE: list[Any] = [
    None, True, 0, -1.5, 10**400, "", " ", "\0", "\ud800", "a\u2028b", [], {}, [[]], [None], [{}], {"": {}},
    {"role": "user"}, [{"from": "gpt"}], [{"from": "gpt", "value": None}], [{"role": "assistant", "content": ["x"]}],
    [[["x"] * 3] * 3],
    [{"from": "function_call", "value": "{"}], '[{"name": 1}]', "NaN", "9" * 5000, "[" * 3000, {"text": [1]},
]  # fmt: skip
BYTES = [
    b"\xff",
    b"\xc3",
    b"\0",
    b"\xef\xbb\xbf",
    b"\r",
    b"\n",
    b'"',
    b"\\",
    b"{",
    b"]" * 50,
    b"NaN",
    b"1e999",
    b"\\ud800",
]


def drop_bytes(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.randint(1, 40) :]


def insert_bytes(data: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 5)):
        start = rng.randrange(len(data))
        data = data[:start] + rng.choice(BYTES) + data[start:]
    return data


def flip_bytes(data: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 30)):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    return bytes(damaged)


def cut_short(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def cut_lines(data: bytes, rng: random.Random) -> bytes:
    return b"\n".join(
        line[: rng.randrange(len(line))] if line and rng.random() < 0.2 else line for line in data.split(b"\n")
    )


def on_rows(change: Callable[[dict[str, Any], random.Random], Any]) -> Callable[[bytes, random.Random], bytes]:
    """A corruption of the file that changes some of its rows as values."""

    def corrupt(data: bytes, rng: random.Random) -> bytes:
        rows = [json.loads(line) for line in data.split(b"\n") if line]
        changed = [change(row, rng) if rng.random() < 0.3 else row for row in rows]
        return "".join(json.dumps(row) + "\n" for row in changed).encode()

    return corrupt


def wrong_type(row: dict[str, Any], rng: random.Random) -> Any:
    return {**row, rng.choice(list(row)): rng.choice(GARBAGE)}


def swapped_fields(row: dict[str, Any], rng: random.Random) -> Any:
    names = list(row)
    rng.shuffle(names)
    return dict(zip(names, row.values(), strict=True))


def renamed_field(row: dict[str, Any], rng: random.Random) -> Any:
    wrong = rng.choice(list(row))
    return {rng.choice(["text", "prompt", "messages", "", "x"]) if name == wrong else name: row[name] for name in row}


def nested_garbage(row: dict[str, Any], rng: random.Random) -> Any:
    """Replaces one value somewhere inside the row."""
    inner: Any = row
    while True:
        key = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        if not isinstance(inner[key], dict | list) or not inner[key] or rng.random() < 0.2:
            inner[key] = rng.choice(GARBAGE)
            return row
        inner = inner[key]


def not_a_row(row: dict[str, Any], rng: random.Random) -> Any:
    return rng.choice([*GARBAGE, row, [row]])


CORRUPTIONS: list[Callable[[bytes, random.Random], bytes]] = [
    drop_bytes, insert_bytes, flip_bytes, cut_short, cut_lines,
    *map(on_rows, [wrong_type, swapped_fields, renamed_field, nested_garbage, not_a_row]),
]  # fmt: skip


def read_or_refuse(path: Path, format: str | None) -> Reading | str:
    """What was read, or the sentence of the DataError; any other exception fails the test."""
    try:
        return read_examples(str(path), task=None, format=format, on_error="skip")
    except DataError as error:
        return str(error)


@pytest.fixture(params=FILES)
def sample(request: pytest.FixtureRequest) -> bytes:
    path = Path(__file__).parents[2].parent / "shared" / "data" / f"{request.param}.jsonl"
    if not path.is_file():
        pytest.skip("needs the data folder ../shared/data beside the checkout")
    with path.open("rb") as stream:
        return b"".join(next(stream) for _ in range(NUM_ROWS))


@pytest.mark.parametrize("corrupt", CORRUPTIONS)
@pytest.mark.parametrize("format", [None, "alpaca", "sharegpt", "question_answer", "sharegpt_preference"])
def test_a_damaged_file_loses_no_row_in_silence(
    tmp_path: Path, sample: bytes, corrupt: Callable[[bytes, random.Random], bytes], format: str | None
) -> None:
    for seed in range(7):  # 10 corruptions x 5 files x 7 seeds = 350 damaged files
        damaged = corrupt(sample, random.Random(seed))
        (tmp_path / "a.jsonl").write_bytes(damaged)
        num_rows = sum(1 for line in damaged.split(b"\n") if line.removeprefix(b"\xef\xbb\xbf").strip())
        outcome = read_or_refuse(tmp_path / "a.jsonl", format)
        if isinstance(outcome, Reading):
            assert outcome.num_rows == num_rows == len(outcome.examples) + len(outcome.bad)
            assert all(bad.reason for bad in outcome.bad)
        else:
            assert outcome.startswith(str(tmp_path))


def test_damage_stays_where_it_is(tmp_path: Path, sample: bytes) -> None:
    """A row whose line is untouched gives the example that it gave before, for every damage that keeps the lines."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(sample)
    whole = {origin.line: example for origin, example in read_examples(str(path), task=None).examples}
    for seed in range(20):
        lines, rng = sample.split(b"\n"), random.Random(seed)
        hit = set(rng.sample(range(1, NUM_ROWS), 5))  # the first row stays: the format comes from it
        path.write_bytes(b"\n".join(cut_short(line, rng) + b"{" if i in hit else line for i, line in enumerate(lines)))
        reading = read_examples(str(path), task=None, on_error="skip")
        assert {bad.origin.line - 1 for bad in reading.bad} == hit
        assert {origin.line: example for origin, example in reading.examples} == {
            line: example for line, example in whole.items() if line - 1 not in hit
        }


@pytest.mark.parametrize("suffix", [".json", ".jsonl.gz", ".csv", ".tsv", ".parquet", ".txt", ".md"])
def test_damage_to_any_kind_of_file_is_an_error_or_a_reported_row(tmp_path: Path, sample: bytes, suffix: str) -> None:
    rows = sample.replace(b"\n", b",")[:-1]
    data = b"[" + rows + b"]" if suffix == ".json" else gzip.compress(sample) if suffix == ".jsonl.gz" else sample
    for seed in range(10):
        rng = random.Random(seed)
        path = tmp_path / f"a{suffix}"
        path.write_bytes(rng.choice([drop_bytes, insert_bytes, flip_bytes, cut_short])(data, rng))
        outcome = read_or_refuse(path, None)
        if isinstance(outcome, Reading):
            assert outcome.num_rows == len(outcome.examples) + len(outcome.bad) > 0
        else:
            assert outcome.startswith(str(tmp_path))
