"""TokenBatch: sequences end to end in one flat stream, and how a step's sequences are cut into such batches.

There is no padding anywhere. A batch says where each sequence begins, which positions predict a trained token and
which token that is; everything else about the examples is gone by now. The order of the data is a function of the
seed and the epoch, so the content of any step is known without the steps before it: that is what makes a resumed run
the same run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from luthier.data.sequences import TokenSequence
from luthier.errors import DataError

__all__ = ["StepPlan", "TokenBatch", "collate", "cut", "pack"]


@dataclass(frozen=True)
class TokenBatch:
    """A padding-free stream of sequences.

    token_ids, positions: [tokens] int64; positions restart with each sequence. lengths: tokens of each sequence.
    target_index: [targets], the stream position whose hidden state predicts the target (the one before it).
    target_ids: [targets] int64. weights: [targets] float32. target_sequence: [targets], which sequence a target is of.
    """

    token_ids: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    target_index: Tensor
    target_ids: Tensor
    weights: Tensor
    target_sequence: Tensor

    def count(self, unit: str) -> int:
        """How many units of a loss lie in this batch; what the loop divides by. unit: tokens or sequences."""
        return len(self.target_ids) if unit == "tokens" else len(self.lengths)

    @cached_property
    def num_tokens(self) -> int:
        """All tokens of the stream, trained or not."""
        return len(self.token_ids)

    def to(self, device: torch.device) -> "TokenBatch":
        """The same batch on another device."""
        if self.token_ids.device == device:
            return self
        return TokenBatch(
            token_ids=self.token_ids.to(device),
            positions=self.positions.to(device),
            lengths=self.lengths,
            target_index=self.target_index.to(device),
            target_ids=self.target_ids.to(device),
            weights=self.weights.to(device),
            target_sequence=self.target_sequence.to(device),
        )


def collate(sequences: Sequence[TokenSequence]) -> TokenBatch:
    """The sequences as one stream, in the order given."""
    lengths = tuple(len(s) for s in sequences)
    starts = np.cumsum((0, *lengths[:-1]))
    token_ids = np.concatenate([s.token_ids for s in sequences]).astype(np.int64)
    local = [np.flatnonzero(s.trained[1:]) for s in sequences]
    index = np.concatenate([start + where for start, where in zip(starts, local, strict=True)]).astype(np.int64)
    return TokenBatch(
        token_ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
        lengths=lengths,
        target_index=torch.from_numpy(index),
        target_ids=torch.from_numpy(token_ids[index + 1]),
        weights=torch.ones(len(index)),
        target_sequence=torch.from_numpy(np.repeat(np.arange(len(local)), [len(where) for where in local])),
    )


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit-decreasing: indices of `lengths` in bins of at most `capacity` tokens, within 11/9 of the fewest bins.

    A length above the capacity gets a bin of its own. Within a bin and among bins the given order is kept.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((b for b, free in enumerate(room) if lengths[i] <= free), None)
        if place is None:
            bins.append([])
            room.append(capacity)
            place = len(bins) - 1
        bins[place].append(i)
        room[place] -= lengths[i]
    return sorted(sorted(members) for members in bins)


def cut(
    sequences: Sequence[TokenSequence], micro_batch_tokens: int | None, *, packing: bool = True
) -> list[TokenBatch]:
    """A step's sequences as micro-batches of at most so many tokens (None: all in one; packing off: one sequence
    each).
    """
    if not packing:
        return [collate([s]) for s in sequences]
    if micro_batch_tokens is None:
        return [collate(sequences)]
    bins = pack([len(s) for s in sequences], micro_batch_tokens)
    return [collate([sequences[i] for i in members]) for members in bins]


@dataclass(frozen=True)
class StepPlan:
    """Which sequences each optimizer step sees: a shuffle per epoch, batch_size at a time, the last step of an epoch
    short.
    """

    sequences: Sequence[TokenSequence]
    batch_size: int
    epochs: int
    seed: int
    max_steps: int | None = None

    def __post_init__(self) -> None:
        if not any(s.num_trained for s in self.sequences):
            raise DataError("no sequence has a trained token; look at the data with `luthier data preview`")

    @property
    def steps_per_epoch(self) -> int:
        """Steps that go through the data once."""
        return -(-len(self.sequences) // self.batch_size)

    @property
    def num_steps(self) -> int:
        """Steps of the whole training."""
        whole = self.steps_per_epoch * self.epochs
        return whole if self.max_steps is None else min(whole, self.max_steps)

    def epoch_at(self, step: int) -> float:
        """Epochs gone through once `step` steps are done."""
        return step / self.steps_per_epoch

    def step(self, index: int) -> list[TokenSequence]:
        """The sequences of step `index`, counted from 0; the same whatever was asked before."""
        epoch, within = divmod(index, self.steps_per_epoch)
        order = _shuffled(len(self.sequences), self.seed, epoch)
        return [self.sequences[i] for i in order[within * self.batch_size : (within + 1) * self.batch_size]]


@lru_cache(maxsize=2)
def _shuffled(num_sequences: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(num_sequences)
