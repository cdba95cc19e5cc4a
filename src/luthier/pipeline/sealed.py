"""What a run writes down for itself, as JSON with a hash of what it says, so that a damaged file is never believed.

A hash is of the values and not of the bytes: spaces may change. Against whoever writes on purpose it is no protection.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.errors import CheckpointError
from luthier.files import write_whole

__all__ = [
    "OTHER",
    "SEAL",
    "read_rows",
    "read_sealed",
    "read_sealed_rows",
    "seal_of",
    "write_sealed",
    "write_sealed_rows",
]

SEAL = "sha256"
OTHER = "it says something else than was written"


def seal_of(values: object) -> str:
    """SHA-256 of values that JSON knows, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Writes them with their hash, whole or not at all."""
    write_whole(path, json.dumps({**values, SEAL: seal_of(values)}, indent=1) + "\n")


def read_sealed(path: Path, *, mend: str) -> dict[str, Any]:
    """The values as they were written. Raises CheckpointError for anything else. mend: what to do about it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and found.pop(SEAL, None) == seal_of(found):
            return found
        why = OTHER
    except (OSError, ValueError) as error:
        why = str(error)
    raise CheckpointError(f"{path}: is damaged ({why}); {mend}")


def write_sealed_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes them as JSON lines, the last of which is their hash, whole or not at all."""
    lines = [*rows, {SEAL: seal_of(rows)}]
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_sealed_rows(path: Path, *, mend: str) -> list[dict[str, Any]]:
    """The rows as they were written. Raises CheckpointError for anything else."""
    rows = read_rows(path, mend=mend)
    if not rows or rows.pop() != {SEAL: seal_of(rows)}:
        raise CheckpointError(f"{path}: is damaged ({OTHER}); {mend}")
    return rows


def read_rows(path: Path, *, mend: str, names: Collection[str] = ()) -> list[dict[str, Any]]:
    """Objects on lines, without a hash, each with these names at least. Raises CheckpointError where one is none."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        if all(isinstance(row, dict) and row.keys() >= set(names) for row in rows):
            return rows
        why = OTHER
    except (OSError, ValueError) as error:
        why = str(error)
    raise CheckpointError(f"{path}: is damaged ({why}); {mend}")
