"""Safetensors files as bytes: read and written tensor by tensor, and hashed without loading a model.

Writing streams: the header first, then one tensor at a time, so that a conversion never holds more than it works on.
Reading copies and does not map: mapped pages would count as this process's memory until the system wants them back.
The hash covers names, types, shapes and values, not how they are cut into files, and is remembered in the cache.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from luthier.errors import ModelError
from luthier.files import replacing
from luthier.models.cache import cache_folder

__all__ = ["LazyTensor", "read_safetensors", "read_weights", "weights_hash", "write_safetensors", "write_weights"]

_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 2),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 8),
}

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that is read when its turn comes. dtype: safetensors' word, as BF16; `read` gives the elements' bytes,
    in an array of any type.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        """The space it takes in the file."""
        return math.prod(self.shape) * _BYTES[self.dtype]


def read_safetensors(file: Path) -> list[LazyTensor]:
    """The tensors of one file, in its order; each is read from the disk, as bytes, when asked for.

    Raises ModelError if the file is damaged or holds a type of numbers that is not known here.
    """
    tensors = []
    for name, entry in _entries(file).items():
        if entry["dtype"] not in _BYTES:
            raise ModelError(
                f"{file}: {name} is stored as {entry['dtype']}, which is not known here; convert the model"
            )
        start, end = entry["data_offsets"]
        read = partial(np.fromfile, file, np.uint8, end - start, offset=start)
        tensors.append(LazyTensor(name, entry["dtype"], tuple(entry["shape"]), read))
    return tensors


def read_weights(folder: Path) -> dict[str, list[LazyTensor]]:
    """A model's tensors by the file that holds them: `model.safetensors`, or each file that its index names.

    Raises ModelError if there is neither, or one is damaged.
    """
    names = {_WHOLE} if (folder / _WHOLE).is_file() else _indexed(folder / _INDEX)
    return {name: read_safetensors(folder / name) for name in sorted(names)}


def _indexed(index: Path) -> set[str]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if all(Path(name).name == name for name in names):
            return names
    except FileNotFoundError:
        raise ModelError(f"{index.parent}: has neither {_WHOLE} nor {_INDEX}; fetch the model again") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ModelError(f"{index}: is no index of weight files that lie beside it; fetch the model again")


def write_weights(folder: Path, files: Mapping[str, Sequence[LazyTensor]]) -> None:
    """The files of a model, tensor by tensor, with an index if there are several."""
    for name, tensors in files.items():
        write_safetensors(folder / name, tensors)
    if len(files) > 1:
        total = {"total_size": sum(tensor.num_bytes for tensors in files.values() for tensor in tensors)}
        places = {tensor.name: name for name, tensors in files.items() for tensor in tensors}
        text = json.dumps({"metadata": total, "weight_map": dict(sorted(places.items()))}, indent=2)
        (folder / _INDEX).write_text(text + "\n", encoding="utf-8")


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
            _write(stream, tensor)


def _write(stream: BinaryIO, tensor: LazyTensor) -> None:
    values = np.ascontiguousarray(tensor.read())  # gone when this returns, before the next is read
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
    entries = _entries(file)
    with ThreadPoolExecutor() as threads:  # reading and hashing let go of the interpreter
        digests = list(threads.map(lambda entry: _digest(file, *entry["data_offsets"]), entries.values()))
    for (name, entry), digest in zip(entries.items(), digests, strict=True):
        yield name, entry["dtype"], entry["shape"], digest


def _entries(file: Path) -> dict[str, Any]:
    """What the header says of each tensor, in the order of their bytes; data_offsets counted from the file's start."""
    _check(file)
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    for entry in header.values():
        entry["data_offsets"] = [8 + length + offset for offset in entry["data_offsets"]]
    return dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))


def _check(file: Path) -> None:
    """The library's own checks: a whole header, and a file exactly as long as the header says."""
    try:
        with safe_open(file, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: is no whole safetensors file ({error}); fetch or save the model again") from error


def _digest(file: Path, start: int, end: int) -> str:
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        while chunk := stream.read(min(_CHUNK_BYTES, end - stream.tell())):
            digest.update(chunk)
    return digest.hexdigest()


def _remember(place: Path, digest: str) -> None:
    """A cache that cannot be written costs time later, nothing else."""
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place, ending=str(os.getpid())) as beside:
            beside.write_text(digest)
