"""Files and folders that stand whole or not at all, whenever a process is killed.

What is new is written beside its place, in the same folder, and renamed onto it: a reader finds the old or the new. A
folder is flushed to the disk first; a small file, which can be made again, is not.
"""

import glob
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

__all__ = ["file_hash", "flush", "replacing", "write_whole", "written_whole"]


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path, *, ending: str = "part") -> Iterator[Path]:
    """A free place beside `path` for a file or a link, which takes its place, and that of an older one, at the end.

    ending: tells apart the processes that may write the same file at the same time, where there are such.
    """
    beside = _beside(path, ending)
    beside.unlink(missing_ok=True)
    try:
        yield beside
        os.replace(beside, path)
    finally:
        with suppress(OSError):  # what went wrong before says more
            beside.unlink(missing_ok=True)


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
        for path in [*beside.rglob("*"), beside]:
            flush(path)
        if folder.exists():
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)
        beside.rename(folder)
        flush(folder.parent)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{ending}")


def _remove_leftovers(folder: Path) -> None:
    """What processes that were killed have left half-written."""
    for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.partial-*"):
        writer = leftover.name.rpartition("-")[2]
        if writer.isdecimal() and not psutil.pid_exists(int(writer)):
            shutil.rmtree(leftover, ignore_errors=True)
