"""The two files of an adapter in PEFT's layout, read and written; what they mean is said in `peft_format.py`."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from luthier.errors import AdapterError
from luthier.files import ELSEWHERE, not_written, replacing, write_whole

__all__ = ["CONFIG", "OWN_FIELD", "WEIGHTS", "opened", "read_config", "refuse_damaged", "write_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SEAL = "sha256"
OWN_FIELD = "luthier"  # of the configuration, or of the weights' metadata: our own settings


def write_adapter(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    """Writes the two files of an adapter. Raises AdapterError where that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / WEIGHTS) as beside:
            beside.write_bytes(_sealed(serialize(dict(tensors), {"format": "pt", **metadata})))
        write_whole(folder / CONFIG, json.dumps(dict(config), indent=2, sort_keys=True) + "\n")
    except (OSError, SafetensorError) as error:
        wanted = sum(tensor.nbytes for tensor in tensors.values())
        raise AdapterError(not_written(folder, error, wanted=wanted, mend=ELSEWHERE)) from error


def _sealed(data: bytes) -> bytes:
    """The same safetensors file with a hash of what it says among its metadata, and the words of its header in order:
    safetensors itself writes them in any.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"][_SEAL] = _digest(header, data[start:])
    text = _sorted(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[start:]


def _digest(header: Mapping[str, Any], values: bytes) -> str:
    return hashlib.sha256(_sorted(header) + values).hexdigest()


def _sorted(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, sort_keys=True, separators=(",", ":")).encode()


def refuse_damaged(path: Path) -> None:
    """Raises AdapterError where a file of weights says something else than its hash. Those of others have none; PEFT
    reads ours, and writes it anew without.
    """
    with opened(path) as file:
        if _SEAL not in (file.metadata() or {}):
            return
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    if header["__metadata__"].pop(_SEAL) != _digest(header, data[start:]):
        raise AdapterError(f"{path}: damaged, for it says something else than was written; copy it again")


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration. Raises AdapterError where there is none, or no JSON object."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{folder}: no adapter here ({CONFIG} is missing); give the folder that holds it") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder / CONFIG}: not JSON ({error}); save the adapter again") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{folder / CONFIG}: not a JSON object; save the adapter again")
    return config


@contextmanager
def opened(path: Path, framework: Literal["np", "pt"] = "pt") -> Iterator[Any]:
    """The file of weights, its tensors given as torch's or numpy's. Raises AdapterError where it cannot be read."""
    if not path.exists():
        raise AdapterError(
            f"{path.parent}: {path.name} is missing; pickled adapters (.bin) are never loaded, save it as safetensors"
        )
    try:
        with safe_open(path, framework) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: damaged or cut short ({error}); copy it again") from None
