"""A training stage's data, from files to audited sequences, with every row accounted for.

Rows are read, encoded with the model's own template, held to the length limit by the stated policy, and split from
what is held out. The audit has looked at them before any step; what would spoil the run raises here.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from luthier.data.audit import Audit, audit
from luthier.data.blocks import blocks_of, mixed
from luthier.data.examples import Chat, Example, Origin, Text
from luthier.data.masks import encode_chat, encode_text
from luthier.data.reading import Reading, read_examples
from luthier.data.sequences import TokenSequence
from luthier.errors import DataError
from luthier.recipe.training import SFT, Pretrain, Training

__all__ = ["Counts", "Prepared", "prepare"]


@dataclass(frozen=True, slots=True)
class Counts:
    """Where the rows went: rows = examples + bad; sequences made of the examples; those over the length limit, of what
    is trained on and of what is held out.
    """

    rows: int
    bad: int
    examples: int
    sequences: int
    held_out: int
    dropped_long: int
    truncated: int
    tokens: int
    trained_tokens: int

    def __str__(self) -> str:
        over = f"{self.dropped_long:,} dropped and {self.truncated:,} cut as longer than max_length"
        return f"{self.rows:,} rows, {self.bad:,} of them bad; {self.sequences:,} sequences to train on; {over}"


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a stage trains and evaluates on."""

    train: list[TokenSequence]
    evaluation: list[TokenSequence]
    audit: Audit
    counts: Counts


def prepare(
    settings: Training,
    tokenizer: PreTrainedTokenizerBase,
    *,
    eos_token_ids: Collection[int] = (),
    quarantine: Path | None = None,
) -> Prepared:
    """Reads, encodes, limits, splits and audits.

    Raises DataError for rows that do not fit and for data that would spoil the run.
    """
    reading = _read(settings, settings.data, quarantine)
    if not reading.examples:
        raise DataError(f"{_named(settings.data)}: no usable row among {reading.num_rows}; see what is wrong with each")
    training, held_out = _split(reading.examples, settings)
    if settings.eval_data is not None:
        held_out = _read(settings, settings.eval_data, None).examples
    train, long = _sequences(training, settings, tokenizer)
    evaluation, long_held_out = _sequences(held_out, settings, tokenizer)
    if not train:
        raise DataError(
            f"{_named(settings.data)}: every sequence is longer than max_length {settings.max_length}; raise it"
        )
    if isinstance(settings, Pretrain):
        train = mixed(train, _general(settings, tokenizer), settings.mix, settings.seed)
    truncates = isinstance(settings, SFT) and settings.on_long == "truncate"
    found = audit(
        train,
        tokenizer,
        train_on=None if isinstance(settings, Pretrain) else settings.train_on,
        max_length=settings.max_length,
        truncated=long if truncates else (),
        eos_token_ids=eos_token_ids,
    )
    if found.spoiled:
        raise DataError(found.sentence())
    return Prepared(train, evaluation, found, _counts(reading, train, held_out, [*long, *long_held_out], truncates))


def _named(patterns: str | Sequence[str]) -> str:
    return patterns if isinstance(patterns, str) else ", ".join(patterns)


def _read(settings: Training, patterns: str | Sequence[str], quarantine: Path | None) -> Reading:
    return read_examples(
        patterns,
        format=settings.format,
        columns=settings.columns,
        on_error=settings.on_error,
        quarantine=quarantine,
    )


Rows = Sequence[tuple[Origin, Example]]


def _split(rows: Rows, settings: Training) -> tuple[Rows, Rows]:
    """Held out are the rows that the seed draws; the same for the same number of rows, whatever else is set."""
    if not settings.eval_fraction:
        return rows, []
    num_held_out = max(1, round(settings.eval_fraction * len(rows)))
    if num_held_out >= len(rows):
        raise DataError(f"eval_fraction leaves nothing to train on of {len(rows)} rows; lower it")
    chosen = set(np.random.default_rng(settings.seed).permutation(len(rows))[:num_held_out].tolist())
    return [r for i, r in enumerate(rows) if i not in chosen], [r for i, r in enumerate(rows) if i in chosen]


def _sequences(
    rows: Rows, settings: Training, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[TokenSequence], list[Origin]]:
    """The encoded rows within the length limit, and the origins of those over it."""
    encoded = [s for origin, example in rows for s in _encode(example, origin, settings, tokenizer)]
    if isinstance(settings, Pretrain):
        return blocks_of(encoded, settings.max_length), []
    assert isinstance(settings, SFT)
    return _limited(encoded, settings)


def _encode(
    example: Example, origin: Origin, settings: Training, tokenizer: PreTrainedTokenizerBase
) -> Iterable[TokenSequence]:
    if isinstance(example, Text):
        return [encode_text(example.text, origin, tokenizer)]
    assert isinstance(example, Chat)
    return encode_chat(example, origin, tokenizer, train_on=settings.train_on)


def _limited(sequences: list[TokenSequence], settings: SFT) -> tuple[list[TokenSequence], list[Origin]]:
    long = [s.origin for s in sequences if len(s) > settings.max_length]
    if long and settings.on_long == "error":
        raise DataError(
            f"{long[0]}: longer than max_length {settings.max_length} tokens, as {len(long)} sequences are; "
            "raise max_length or choose on_long: drop or truncate"
        )
    if settings.on_long == "drop":
        return [s for s in sequences if len(s) <= settings.max_length], long
    return [_cut(s, settings.max_length) for s in sequences], long


def _cut(sequence: TokenSequence, length: int) -> TokenSequence:
    return replace(sequence, token_ids=sequence.token_ids[:length], trained=sequence.trained[:length])


def _general(settings: Pretrain, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[TokenSequence]]:
    general = {}
    for name in settings.mix:
        general[name] = _sequences(_read(settings, name, None).examples, settings, tokenizer)[0]
        if not general[name]:
            raise DataError(f"mix: {name} holds no text; remove it or name another file")
    return general


def _counts(
    reading: Reading, train: list[TokenSequence], held_out: Rows, long: list[Origin], truncates: bool
) -> Counts:
    return Counts(
        rows=reading.num_rows,
        bad=len(reading.bad),
        examples=len(reading.examples),
        sequences=len(train),
        held_out=len(held_out),
        dropped_long=0 if truncates else len(long),
        truncated=len(long) if truncates else 0,
        tokens=sum(map(len, train)),
        trained_tokens=sum(s.num_trained for s in train),
    )
