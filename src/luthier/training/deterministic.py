"""The deterministic mode: only operations that give the same bits each time, for as long as a stage trains.

On a CPU a run is equal to the bit anyway, with the same versions and as many threads. On a GPU sums whose order is left
to the hardware are not: PyTorch has slower forms of most of them, and refuses the others. Float32 products in TF32 are
switched off too. Another kind of GPU, or another version, may round otherwise all the same.
"""

import os
import re
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import backends

from luthier.errors import TrainingError

__all__ = ["deterministic"]

_CUBLAS = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which PyTorch asks for, and cuBLAS needs, for equal bits
_REFUSAL = re.compile(r"(\S+) does not have a deterministic implementation|use_deterministic_algorithms")


@dataclass(frozen=True, slots=True)
class _Switches:
    """PyTorch's own, as the deterministic mode wants them. precisions: of float32 products, convolutions, recurrences.

    They are not read or set by their older names (allow_tf32): PyTorch refuses to have both in one process.
    """

    algorithms: bool = True
    warn_only: bool = False
    benchmark: bool = False
    cudnn: bool = True
    precisions: tuple[str, ...] = ("ieee", "ieee", "ieee")

    @classmethod
    def now(cls) -> "_Switches":
        return cls(
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            backends.cudnn.benchmark,
            backends.cudnn.deterministic,
            tuple(place.fp32_precision for place in _with_precision()),
        )

    def set(self) -> None:
        torch.use_deterministic_algorithms(self.algorithms, warn_only=self.warn_only)
        backends.cudnn.benchmark, backends.cudnn.deterministic = self.benchmark, self.cudnn
        for place, precision in zip(_with_precision(), self.precisions, strict=True):
            place.fp32_precision = precision


def _with_precision() -> tuple[Any, ...]:
    cudnn: Any = backends.cudnn  # its type does not tell these
    return backends.cuda.matmul, cudnn.conv, cudnn.rnn


@contextmanager
def deterministic(wanted: bool, *, environment: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """Equal bits within the context, where wanted; what was set before holds again after it.

    Raises TrainingError for an operation that has no deterministic form.
    """
    if not wanted:
        yield
        return
    before, cublas = _Switches.now(), environment.get(_CUBLAS[0])
    environment.setdefault(*_CUBLAS)
    try:
        _Switches().set()
        yield
    except RuntimeError as error:
        if found := _REFUSAL.search(str(error)):
            raise TrainingError(
                f"deterministic: {found[1] or 'an operation'} gives other bits each time here, and has no other form; "
                "drop deterministic, or train what does not need it"
            ) from error
        raise
    finally:
        before.set()
        if cublas is None:
            environment.pop(_CUBLAS[0], None)
