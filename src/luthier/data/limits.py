"""The length limit: which items are over it, and what becomes of them.

An item is over the limit if any of its sequences is. Cut is only the end: of a conversation, or of each answer to a
prompt. Answers of which nothing is left, or that no longer differ, teach nothing, so their item is dropped instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from luthier.data.examples import Origin
from luthier.data.sequences import Item, TokenGroup, TokenSequence, sequences_of
from luthier.errors import DataError

__all__ = ["Limited", "limit"]


@dataclass(frozen=True, slots=True)
class Limited:
    """What is left of some items: those kept, and the origins of those that were dropped and of those that were cut."""

    kept: list[Item]
    dropped: list[Origin]
    cut: list[Origin]


def limit(items: Sequence[Item], max_length: int, on_long: Literal["drop", "error", "truncate"]) -> Limited:
    """Holds every sequence to max_length tokens. Raises DataError for "error" where one is longer."""
    long = [item for item in items if _is_long(item, max_length)]
    if long and on_long == "error":
        raise DataError(
            f"{long[0].origin}: longer than max_length {max_length} tokens, as {len(long)} sequences are; "
            "raise max_length or choose on_long: drop or truncate"
        )
    limited = Limited([], [], [])
    for item in items:
        if not _is_long(item, max_length):
            limited.kept.append(item)
        elif on_long == "truncate" and (cut := _cut(item, max_length)) is not None:
            limited.kept.append(cut)
            limited.cut.append(item.origin)
        else:
            limited.dropped.append(item.origin)
    return limited


def _is_long(item: Item, max_length: int) -> bool:
    return any(len(sequence) > max_length for sequence in sequences_of([item]))


def _cut(item: Item, length: int) -> Item | None:
    if not isinstance(item, TokenGroup):
        return _shortened(item, length)
    sequences = tuple(_shortened(sequence, length) for sequence in item.sequences)
    differ = len({sequence.token_ids.tobytes() for sequence in sequences}) == len(sequences)
    if not differ or not all(one.num_trained for one in sequences):
        return None
    correct = None if item.correct is None else item.correct[: sequences[0].num_trained]
    return replace(item, sequences=sequences, correct=correct)


def _shortened(sequence: TokenSequence, length: int) -> TokenSequence:
    return replace(sequence, token_ids=sequence.token_ids[:length], trained=sequence.trained[:length])
