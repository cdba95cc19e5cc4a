"""The user's cache, and folders that appear whole or not at all.

What is fetched or converted is kept in the cache, made once even if two processes ask at the same time. A folder is
written beside its place, flushed to the disk and renamed, so a kill at any moment leaves nothing that looks finished.
"""

import glob
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
from filelock import FileLock

from luthier.errors import ModelError

__all__ = ["cache_folder", "made_once", "written_whole"]


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """$LUTHIER_CACHE, else $XDG_CACHE_HOME/luthier, else ~/.cache/luthier; it need not exist yet."""
    if own := environment.get("LUTHIER_CACHE"):
        return Path(own).expanduser().absolute()
    if shared := environment.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser().absolute() / "luthier"
    return Path.home() / ".cache" / "luthier"


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder; if it is missing, `make` fills it, in one process while the others wait for it."""
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if not folder.is_dir():
                with written_whole(folder) as beside:
                    make(beside)
    except OSError as error:
        raise ModelError(
            f"{folder}: cannot be written ({error.strerror or error}); make room or set LUTHIER_CACHE to another folder"
        ) from error
    return folder


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` to write into, which takes its place, and that of an older one, at the end."""
    _remove_leftovers(folder)
    beside = _beside(folder, f"partial-{os.getpid()}")
    previous = _beside(folder, "previous")
    if previous.exists() and not folder.exists():
        previous.rename(folder)  # a process was killed between the two renames below
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        _flush(beside)
        if folder.exists():
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)
        beside.rename(folder)
        _flush_entry(folder.parent)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _beside(folder: Path, ending: str) -> Path:
    return folder.with_name(f".{folder.name}.{ending}")


def _remove_leftovers(folder: Path) -> None:
    """What processes that were killed have left half-written."""
    for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.partial-*"):
        writer = leftover.name.rpartition("-")[2]
        if writer.isdecimal() and not psutil.pid_exists(int(writer)):
            shutil.rmtree(leftover, ignore_errors=True)


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _flush_entry(path)


def _flush_entry(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
