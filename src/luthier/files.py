"""Files and folders that stand whole or not at all, whenever a process is killed.

What is new is written beside its place, in the same folder, and renamed onto it: a reader finds the old or the new. A
folder is flushed to the disk first; a small file, which can be made again, is not.
"""

import errno
import glob
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

__all__ = [
    "ELSEWHERE",
    "existing",
    "file_hash",
    "flush",
    "free_bytes",
    "in_words",
    "is_full",
    "naming",
    "not_written",
    "replacing",
    "write_whole",
    "written_whole",
]

ELSEWHERE = ", or choose another place"
"""What mends a full disk for whoever chose where to write."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def existing(place: Path) -> Path:
    """The place, or the first folder above it that is there."""
    absolute = place.absolute()
    return next(path for path in (absolute, *absolute.parents) if path.exists())


def free_bytes(folder: Path) -> int:
    """On the disk where this folder is, or will be."""
    return shutil.disk_usage(existing(folder)).free


def in_words(num_bytes: int) -> str:
    """A size as people say it: 1.23 GB, 4.56 MB."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 10**8 else f"{num_bytes / 1e6:.2f} MB"


def is_full(error: Exception) -> bool:
    """Whether a disk, a quota or a file's greatest length was the reason."""
    return _number(error) in _FULL


def _number(error: Exception) -> int | None:
    """The system's number of an error, which libraries in Rust say in words."""
    if isinstance(error, OSError):
        return error.errno
    said = re.search(r"\(os error (\d+)\)", str(error))
    return int(said[1]) if said else None


def not_written(place: Path, error: Exception, *, wanted: int | None = None, mend: str = "") -> str:
    """The sentence of what could not be written: why, and what to do. wanted: its bytes, where they are known. mend:
    how to get by with less room, or what comes afterwards.
    """
    number = _number(error)
    why = str(error) if number is None else os.strerror(number)
    if not is_full(error):
        return f"{place}: cannot be written ({why}); see what is there and who may write, or choose another place"
    free = in_words(free_bytes(place.parent))
    sizes = f"{free} are free" if wanted is None else f"{in_words(wanted)} are wanted, {free} are free"
    return f"{place}: cannot be written ({why}; {sizes}); make room{mend}"


def write_whole(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def naming(place: Path) -> Iterator[None]:
    """An error of the system that names no file, as writing into an open one does, names this one; so does one that
    names its stand-in.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None or Path(error.filename).name.startswith(f".{place.name}."):
            error.filename, error.filename2 = str(place), None
        raise


@contextmanager
def replacing(path: Path, *, ending: str = "part") -> Iterator[Path]:
    """A free place beside `path` for a file or a link, which takes its place, and that of an older one, at the end.

    ending: tells apart the processes that may write the same file at the same time, where there are such.
    """
    beside = _beside(path, ending)
    try:
        beside.unlink(missing_ok=True)
        with naming(path):
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
        with naming(folder):
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
