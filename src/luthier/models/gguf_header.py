"""What a GGUF file says of itself: its metadata by key, and its tensors, to be read one by one."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from gguf.quants import dequantize

from luthier.errors import ModelError
from luthier.models.weights import LazyTensor

__all__ = ["Header", "read_gguf"]

_KEPT = {GGMLQuantizationType.BF16: "BF16", GGMLQuantizationType.F16: "F16"}


@dataclass(frozen=True, slots=True)
class Header:
    """A GGUF file's metadata. Keys of `setting` and `number` stand under the architecture's own prefix."""

    file: Path
    values: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.required("general.architecture"))

    def required(self, key: str) -> Any:
        """The value of a full key. Raises ModelError if there is none."""
        if key not in self.values:
            raise ModelError(f"{self.file}: its metadata has no {key}; fetch the file or convert the model again")
        return self.values[key]

    def setting(self, key: str, default: Any = None) -> Any:
        """The architecture's setting, or the default."""
        return self.values.get(f"{self.architecture}.{key}", default)

    def number(self, key: str, default: float | None = None) -> Any:
        """A setting that must be one number for the whole model. Raises ModelError if it is missing or a list."""
        value = self.setting(key, default)
        if value is None:
            value = self.required(f"{self.architecture}.{key}")
        if not isinstance(value, int | float):
            raise ModelError(
                f"{self.file}: {key} differs from layer to layer, which is not known here; "
                "use the model's safetensors folder instead"
            )
        return value


def read_gguf(file: Path) -> tuple[Header, dict[str, LazyTensor]]:
    """The metadata and the tensors, dequantized when read: BF16 and F16 matrices as they are, all else as F32.

    Raises ModelError if the file is damaged or no GGUF file.
    """
    try:
        reader = GGUFReader(file)
        header = Header(file, {name: field.contents() for name, field in reader.fields.items()})
        return header, {tensor.name: _lazy(tensor) for tensor in reader.tensors}
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror or error}); check its rights") from error
    except (ValueError, KeyError, IndexError, OverflowError, TypeError) as error:  # the reader checks little
        raise ModelError(f"{file}: is damaged or no GGUF file ({error}); fetch it again") from error


def _lazy(tensor: ReaderTensor) -> LazyTensor:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    if tensor.tensor_type not in _KEPT or len(shape) == 1:  # vectors are small, and some are calculated with
        return LazyTensor(tensor.name, "F32", shape, partial(dequantize, tensor.data, tensor.tensor_type))
    bits = tensor.data.view(np.uint16).reshape(shape)
    return LazyTensor(tensor.name, _KEPT[tensor.tensor_type], shape, lambda: bits)
