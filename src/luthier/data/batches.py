"""TokenBatch: sequences end to end in one flat stream, and how a step's items are cut into such batches.

There is no padding anywhere, and what a group's sequences begin with is there once. A batch says where each sequence
begins, which positions predict a trained token and which token that is; everything else about the examples is gone by
now. The order of the data is a function of the seed and the epoch, so the content of any step is known without the
steps before it: that is what makes a resumed run the same run.
"""

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from itertools import combinations
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from luthier.data.sequences import Item, TokenGroup, TokenSequence
from luthier.errors import DataError
from luthier.kernels.streams import Segments

__all__ = ["Plan", "StepPlan", "TokenBatch", "collate", "cut", "pack", "pass_sizes", "passes", "pieces"]


@dataclass(frozen=True)
class TokenBatch:
    """A padding-free stream of sequences, of which those of a group share what they begin with.

    token_ids, positions: [tokens] int64; positions restart with each sequence. segments: how the stream is cut.
    target_index: [targets], the stream position whose hidden state predicts the target (the one before it).
    target_ids: [targets] int64. weights: [targets] float32. target_sequence: [targets], which sequence a target is of,
    rising. target_counts: targets of each sequence. last_index: [sequences], the position of its last token.

    Of preferences, pairs: [pairs, 2], the better sequence and the worse; margins: [pairs], by how much where it is
    known, else 0. Of answers in steps, correct: [targets] bool. Of feedback, desirable: [sequences] bool; mismatched: a
    batch of answers to other prompts; baseline: a scalar made of them. reference: [sequences], the reference model's
    log p of each sequence's targets. columns: what is known of each target, by name, [targets] float32.
    """

    token_ids: Tensor
    positions: Tensor
    segments: Segments
    target_index: Tensor
    target_ids: Tensor
    weights: Tensor
    target_sequence: Tensor
    target_counts: tuple[int, ...]
    last_index: Tensor
    pairs: Tensor
    margins: Tensor
    correct: Tensor | None = None
    desirable: Tensor | None = None
    reference: Tensor | None = None
    mismatched: "TokenBatch | None" = None
    baseline: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    def count(self, unit: str) -> int:
        """How many units of a loss lie in this batch; what the loop divides by. unit: tokens, sequences or pairs."""
        return len({"tokens": self.target_ids, "sequences": self.last_index, "pairs": self.pairs}[unit])

    @cached_property
    def num_tokens(self) -> int:
        """All tokens of the stream, trained or not."""
        return len(self.token_ids)

    def to(self, device: torch.device) -> "TokenBatch":
        """The same batch on another device."""
        if self.token_ids.device == device:
            return self
        held: dict[str, Any] = {own.name: getattr(self, own.name) for own in fields(self)}
        moved = {name: value.to(device) for name, value in held.items() if isinstance(value, Tensor | TokenBatch)}
        columns = {name: column.to(device) for name, column in self.columns.items()}
        return TokenBatch(**{**held, **moved, "columns": columns})


def collate(items: Sequence[Item]) -> TokenBatch:
    """The items as one stream, in the order given."""
    laid = _Laid()
    for item in items:
        laid.add(item)
    groups = [item for item in items if isinstance(item, TokenGroup)]
    return laid.batch(groups if len(groups) == len(items) else [])


class _Laid:
    """A stream that grows."""

    def __init__(self) -> None:
        self.segments: list[tuple[NDArray[np.int32], int, int | None]] = []  # ids, first position, parent
        self.num_tokens = 0
        self.sequences: list[tuple[NDArray[np.int64], NDArray[np.int32]]] = []  # of each: target_index, target_ids
        self.last_index: list[int] = []
        self.pairs: list[tuple[int, int]] = []
        self.margins: list[float] = []
        self.columns: list[Mapping[str, NDArray[np.float32]]] = []  # of each sequence

    def add(self, item: Item) -> None:
        """A sequence, or a group with what its sequences share before them."""
        if not isinstance(item, TokenGroup):
            self._add_sequence(item, 0, 0, None)
            return
        shared, first = item.num_shared, len(self.sequences)
        start = self.num_tokens
        parent = self._add_segment(item.sequences[0].token_ids[:shared], 0, None) if shared else None
        for sequence in item.sequences:
            self._add_sequence(sequence, shared, start, parent)
        for better, worse, margin in _ranked(item):
            self.pairs.append((first + better, first + worse))
            self.margins.append(margin)

    def _add_segment(self, ids: NDArray[np.int32], position: int, parent: int | None) -> int:
        self.segments.append((ids, position, parent))
        self.num_tokens += len(ids)
        return len(self.segments) - 1

    def _add_sequence(self, sequence: TokenSequence, shared: int, shared_start: int, parent: int | None) -> None:
        """shared: how many of its tokens lie at `shared_start` already."""
        moved = self.num_tokens - shared
        self._add_segment(sequence.token_ids[shared:], shared, parent)
        local = np.flatnonzero(sequence.trained[1:])
        index = np.where(local < shared, local + shared_start, local + moved)
        self.sequences.append((index, sequence.token_ids[local + 1]))
        self.last_index.append(self.num_tokens - 1)
        self.columns.append(sequence.columns)

    def batch(self, groups: Sequence[TokenGroup]) -> TokenBatch:
        """groups: all items, if all are groups."""
        lengths = [len(ids) for ids, _, _ in self.segments]
        index, targets = (np.concatenate(parts).astype(np.int64) for parts in zip(*self.sequences, strict=True))
        counts = [len(part) for part, _ in self.sequences]
        return TokenBatch(
            token_ids=torch.from_numpy(np.concatenate([ids for ids, _, _ in self.segments]).astype(np.int64)),
            positions=torch.from_numpy(np.concatenate([np.arange(p, p + len(ids)) for ids, p, _ in self.segments])),
            segments=Segments(tuple(lengths), tuple(parent for _, _, parent in self.segments)),
            target_index=torch.from_numpy(index),
            target_ids=torch.from_numpy(targets),
            weights=torch.ones(len(index)),
            target_sequence=torch.from_numpy(np.repeat(np.arange(len(counts)), counts)),
            target_counts=tuple(counts),
            last_index=torch.tensor(self.last_index),
            pairs=torch.tensor(self.pairs, dtype=torch.int64).view(-1, 2),
            margins=torch.tensor(self.margins),
            correct=_each([flag for g in groups for flag in g.correct or (None,)], torch.bool),
            desirable=_each([g.desirable for g in groups for _ in g.sequences], torch.bool),
            reference=_each([n for g in groups for n in g.reference or (None,)], torch.float32),
            mismatched=_mismatched(groups),
            columns=_joined(self.columns),
        )


def _ranked(group: TokenGroup) -> Iterator[tuple[int, int, float]]:
    """Every two of its sequences of which one is the better: their numbers, and the difference of their scores."""
    scores = group.scores or (0.0,) * len(group.sequences)
    for better, worse in combinations(range(len(group.sequences)), 2):
        if group.scores is None or scores[better] > scores[worse]:
            yield better, worse, scores[better] - scores[worse]


def _each(values: Sequence[float | None], dtype: torch.dtype) -> Tensor | None:
    return torch.tensor(values, dtype=dtype) if values and None not in values else None


def _joined(columns: Sequence[Mapping[str, NDArray[np.float32]]]) -> dict[str, Tensor]:
    """Those that all sequences have."""
    names = [name for name in columns[0] if all(name in own for own in columns)] if columns else []
    return {name: torch.from_numpy(np.concatenate([own[name] for own in columns])) for name in names}


def _mismatched(groups: Sequence[TokenGroup]) -> TokenBatch | None:
    answers = [
        TokenGroup((g.mismatched,), reference=None if g.mismatched_reference is None else (g.mismatched_reference,))
        for g in groups
        if g.mismatched is not None
    ]
    return collate(answers) if answers else None


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


def passes(items: Sequence[Item], micro_batch_tokens: int | None) -> list[list[int]]:
    """The items' indices in micro-batches of at most so many tokens; None: all in one."""
    lengths = [len(item) for item in items]
    return pack(lengths, sum(lengths) if micro_batch_tokens is None else micro_batch_tokens)


def pass_sizes(items: Sequence[Item], micro_batch_tokens: int | None) -> list[int]:
    """The tokens of each of these micro-batches."""
    return [sum(len(items[i]) for i in members) for members in passes(items, micro_batch_tokens)]


def cut(items: Sequence[Item], micro_batch_tokens: int | None, *, packing: bool = True) -> list[TokenBatch]:
    """A step's items as micro-batches of at most so many tokens (None: all in one; packing off: one item each)."""
    if not packing:
        return [collate([item]) for item in items]
    return [collate([items[i] for i in members]) for members in passes(items, micro_batch_tokens)]


def pieces(group: TokenGroup, most_tokens: int) -> list[TokenGroup]:
    """The group, or as many groups of its answers as it takes for none to be longer; each has the prompt anew.

    As few as can be in the answers' order, and of these the ones whose longest is shortest. For answers that no loss
    compares with each other.
    """
    found = _filled(group, most_tokens)
    if len(found) == 1:
        return found
    shortest = bisect.bisect_left(range(most_tokens), True, key=lambda most: len(_filled(group, most)) <= len(found))
    return _filled(group, shortest)


def _filled(group: TokenGroup, most_tokens: int) -> list[TokenGroup]:
    """Pieces that are full one after the other; one answer is a piece at any length."""
    found: list[tuple[TokenSequence, ...]] = []
    for sequence in group.sequences:
        joined = (*found[-1], sequence) if found else ()
        if joined and len(TokenGroup(joined)) <= most_tokens:
            found[-1] = joined
        else:
            found.append((sequence,))
    return [TokenGroup(members) for members in found]


class Plan(Protocol):
    """Which items each step of a training sees. told: what there is to say of a step besides what is measured in it."""

    @property
    def num_steps(self) -> int: ...

    @property
    def steps_per_epoch(self) -> int: ...

    def epoch_at(self, step: int) -> float: ...

    def step(self, index: int) -> list[Item]: ...

    def told(self, index: int) -> dict[str, float]: ...


@dataclass(frozen=True)
class StepPlan:
    """Which items each step sees: a shuffle per epoch, batch_size at a time, the last step of an epoch short."""

    items: Sequence[Item]
    batch_size: int
    epochs: int
    seed: int
    max_steps: int | None = None

    def __post_init__(self) -> None:
        if not any(item.num_trained for item in self.items):
            raise DataError("no sequence has a trained token; look at the data with `luthier data preview`")

    @property
    def steps_per_epoch(self) -> int:
        """Steps that go through the data once."""
        return -(-len(self.items) // self.batch_size)

    @property
    def num_steps(self) -> int:
        """Steps of the whole training."""
        whole = self.steps_per_epoch * self.epochs
        return whole if self.max_steps is None else min(whole, self.max_steps)

    def epoch_at(self, step: int) -> float:
        """Epochs gone through once `step` steps are done."""
        return step / self.steps_per_epoch

    def told(self, index: int) -> dict[str, float]:
        """Nothing besides what is measured in step `index`."""
        return {}

    def step(self, index: int) -> list[Item]:
        """The items of step `index`, counted from 0; the same whatever was asked before."""
        epoch, within = divmod(index, self.steps_per_epoch)
        order = _shuffled(len(self.items), self.seed, epoch)
        return [self.items[i] for i in order[within * self.batch_size : (within + 1) * self.batch_size]]


@lru_cache(maxsize=2)
def _shuffled(num_sequences: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(num_sequences)
