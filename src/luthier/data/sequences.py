"""Tokenized examples: token ids and which of them are trained, alone or several that begin alike.

The last torch-free form of the data: templates make it, the audit reads it, batches are cut from it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from luthier.data.examples import Origin

__all__ = ["Item", "TokenGroup", "TokenSequence", "sequences_of"]


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence:
    """One tokenized example.

    token_ids: [tokens] int32.
    trained: [tokens] bool; token i is a target, its loss counts. Token 0 never is: nothing stands before it.
    columns: what is known of each target, by name, [targets] float32, such as its advantage.
    """

    token_ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    origin: Origin
    columns: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.token_ids.shape == self.trained.shape
        assert all(len(column) == self.num_trained for column in self.columns.values())

    def __len__(self) -> int:
        return len(self.token_ids)

    def part(self, tokens: slice) -> "TokenSequence":
        """These tokens of a sequence without columns."""
        assert not self.columns
        return replace(self, token_ids=self.token_ids[tokens], trained=self.trained[tokens])

    @property
    def num_trained(self) -> int:
        """How many tokens are targets."""
        return int(self.trained[1:].sum())


@dataclass(frozen=True, slots=True, eq=False)
class TokenGroup:
    """Sequences that begin with the same tokens, which are stored and computed once: answers to one prompt.

    Of a preference the sequences are the answers, the best first; of feedback one answer. Trained are an answer's
    tokens and nothing before.

    scores: one for each sequence, or None. desirable: of feedback. correct: of an answer in steps, whether each is
    right; trained are then the last tokens of the steps. mismatched: for KTO, another row's answer to this
    prompt; it is not trained. reference: log p of each sequence's trained tokens by the reference model, in nats.
    """

    sequences: tuple[TokenSequence, ...]
    scores: tuple[float, ...] | None = None
    desirable: bool | None = None
    correct: tuple[bool, ...] | None = None
    mismatched: TokenSequence | None = None
    reference: tuple[float, ...] | None = None
    mismatched_reference: float | None = None

    @property
    def num_shared(self) -> int:
        """How many tokens all sequences begin with; each keeps one of its own. 0 for a sequence alone."""
        if len(self.sequences) == 1:
            return 0
        shortest = min(map(len, self.sequences))
        stacked = np.stack([s.token_ids[:shortest] for s in self.sequences])
        differ = np.flatnonzero((stacked != stacked[0]).any(0))
        return int(min(differ[0] if len(differ) else shortest, shortest - 1))

    def __len__(self) -> int:
        """Tokens to compute."""
        return sum(map(len, self.sequences)) - (len(self.sequences) - 1) * self.num_shared

    @property
    def num_trained(self) -> int:
        """How many tokens are targets, those of each sequence counted."""
        return sum(s.num_trained for s in self.sequences)

    @property
    def origin(self) -> Origin:
        """Where the example was read."""
        return self.sequences[0].origin


Item = TokenSequence | TokenGroup
"""What a step counts: a sequence, or a group of them."""


def sequences_of(items: Iterable[Item]) -> list[TokenSequence]:
    """All sequences, those of groups one by one."""
    return [s for item in items for s in (item.sequences if isinstance(item, TokenGroup) else (item,))]
