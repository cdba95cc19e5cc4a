"""A tokenized example: token ids and which of them are trained.

The last torch-free form of the data: templates make it, the audit reads it, batches are cut from it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from luthier.data.examples import Origin

__all__ = ["TokenSequence"]


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence:
    """One tokenized example.

    token_ids: [tokens] int32.
    trained: [tokens] bool; token i is a target, its loss counts. Token 0 never is: nothing stands before it.
    """

    token_ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    origin: Origin

    def __post_init__(self) -> None:
        assert self.token_ids.shape == self.trained.shape

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_trained(self) -> int:
        """How many tokens are targets."""
        return int(self.trained[1:].sum())
