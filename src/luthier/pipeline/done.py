"""That a stage is done, what it was trained on and what it has left, in hashes, and whether that is still so.

A stage that is done is not done again, so what follows stands on its files: where one is not as the stage left it, the
run is refused before anything is trained on it, or a manifest says that it came of this run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.errors import CheckpointError
from luthier.files import file_hash
from luthier.pipeline.sealed import read_sealed, write_sealed

__all__ = ["DONE", "is_done", "note_done", "refuse_changed", "refuse_damaged"]

DONE = "done.json"


def is_done(folder: Path) -> bool:
    """Whether the stage in this folder is."""
    return (folder / DONE).exists()


def note_done(folder: Path, *, data: Mapping[str, str], made: Mapping[str, Path]) -> None:
    """Notes it. data: the hashes of what it was trained on. made: folders that it has left, by their words."""
    hashes = {word: _hashes(place) for word, place in made.items() if place.is_dir()}
    write_sealed(folder / DONE, {"data": dict(data), "made": hashes})


def refuse_changed(folder: Path, data: Mapping[str, str]) -> None:
    """Raises CheckpointError where a stage that is done was trained on other data than there is now."""
    trained_on = _read(folder)["data"]
    changed = sorted(name for name in trained_on.keys() | data.keys() if trained_on.get(name) != data.get(name))
    if changed:
        raise CheckpointError(
            f"{folder} is done, but {', '.join(changed)} changed since then; choose another output, or train it again "
            "with resume: false"
        )


def refuse_damaged(folder: Path, word: str, place: Path) -> None:
    """Raises CheckpointError where a file that the stage has left in `place` is not what it was. Files that came there
    afterwards are nobody's concern.
    """
    for name, digest in _read(folder)["made"].get(word, {}).items():
        file = place / name
        if not file.is_file() or file_hash(file) != digest:
            what = "is not as the stage left it" if file.exists() else "is gone"
            raise CheckpointError(
                f"{file}: {what}; delete {folder / DONE} and run again, which makes it anew from the last checkpoint"
            )


def _read(folder: Path) -> dict[str, Any]:
    return read_sealed(folder / DONE, mend="delete it and run again, which hands the stage over once more")


def _hashes(place: Path) -> dict[str, str]:
    return {file.name: file_hash(file) for file in sorted(place.iterdir()) if file.is_file()}
