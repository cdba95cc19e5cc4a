"""Safetensors files as bytes: written tensor by tensor, and hashed without loading a model.

Writing streams: the header first, then one tensor at a time, so that a conversion never holds more than it works on.
The hash covers names, types, shapes and values, not how they are cut into files, and is remembered in the cache.
"""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from luthier.errors import ModelError
from luthier.models.cache import cache_folder

__all__ = ["LazyTensor", "weights_hash", "write_safetensors"]

_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that is read when its turn comes. dtype: BF16, F16 or F32; `read` gives its elements in that type."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        """The space it takes in the file."""
        return math.prod(self.shape) * _BYTES[self.dtype]


def write_safetensors(path: Path, tensors: Sequence[LazyTensor]) -> None:
    """One safetensors file; at any time one tensor is in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        span = [position, position + tensor.num_bytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
        position = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            values = np.ascontiguousarray(tensor.read())
            assert values.nbytes == tensor.num_bytes, tensor.name
            stream.write(values.data)


def weights_hash(folder: Path, environment: Mapping[str, str] = os.environ) -> str:
    """SHA-256 over the names, types, shapes and values in a folder's safetensors files, however they are sharded.

    Computed once and remembered in the cache for as long as sizes and times of the files stay.
    Raises ModelError if the folder has no safetensors file or a damaged one.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder}: has no .safetensors file; give a folder that holds a model")
    stamps = [[file.name, (stat := file.stat()).st_size, stat.st_mtime_ns] for file in files]
    key = hashlib.sha256(json.dumps([str(folder.resolve()), stamps]).encode()).hexdigest()
    remembered = cache_folder(environment) / "hashes" / key
    try:
        return remembered.read_text()
    except OSError:
        digest = _hash(files)
    _remember(remembered, digest)
    return digest


def _hash(files: Sequence[Path]) -> str:
    entries = [entry for file in files for entry in _entry_hashes(file)]
    return hashlib.sha256(json.dumps(sorted(entries)).encode()).hexdigest()


def _entry_hashes(file: Path) -> Iterator[tuple[str, str, list[int], str]]:
    _check(file)
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        spans = [tensor["data_offsets"] for tensor in header.values()]
        with ThreadPoolExecutor() as threads:  # hashing lets go of the interpreter
            digests = list(threads.map(lambda span: _digest(data, start + span[0], start + span[1]), spans))
    for (name, tensor), digest in zip(header.items(), digests, strict=True):
        yield name, tensor["dtype"], tensor["shape"], digest


def _check(file: Path) -> None:
    """The library's own checks: a whole header, and a file exactly as long as the header says."""
    try:
        with safe_open(file, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: is no whole safetensors file ({error}); fetch or save the model again") from error


def _digest(data: mmap.mmap, start: int, end: int) -> str:
    with memoryview(data) as view, view[start:end] as part:
        return hashlib.sha256(part).hexdigest()


def _remember(place: Path, digest: str) -> None:
    """A cache that cannot be written costs time later, nothing else."""
    beside = place.with_name(f"{place.name}.{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(digest)
        os.replace(beside, place)
    except OSError:
        beside.unlink(missing_ok=True)
