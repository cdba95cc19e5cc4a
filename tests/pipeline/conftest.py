"""Files of rows that several stages learn from."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}?", "answer": f"{i}{i}."}) + "\n" for i in range(12)))
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{i}?", "chosen": f"{i}{i}.", "rejected": "no"} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
