"""A training stage's data, from files to audited items, with every row accounted for.

Rows are read, encoded with the model's own template, held to the length limit by the stated policy, and split from
what is held out. The audit has looked at them before any step; what would spoil the run raises here.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from luthier.data.audit import Audit, audit
from luthier.data.blocks import blocks_of, mixed
from luthier.data.encoding import encode
from luthier.data.examples import Example, Origin, Preference
from luthier.data.formats import Task
from luthier.data.limits import Limited, limit
from luthier.data.masks import TrainOn
from luthier.data.pairs import encode_for_reward, with_mismatched
from luthier.data.reading import Reading, read_examples
from luthier.data.sequences import Item, TokenGroup, TokenSequence, sequences_of
from luthier.errors import DataError, RecipeError
from luthier.recipe.preference import KTO, OnAnswers, ProcessReward, Reward, RewardModel
from luthier.recipe.rounds import IterativeDPO
from luthier.recipe.training import SFT, OnChats, Pretrain, Training

__all__ = ["Counts", "Prepared", "prepare", "task_of"]

_TASKS: dict[type[Training], Task] = {
    Pretrain: "imitate",
    SFT: "imitate",
    KTO: "judge",
    ProcessReward: "grade",
    OnAnswers: "prefer",
}


@dataclass(frozen=True, slots=True)
class Counts:
    """Where the rows went: rows = examples + bad; sequences, or groups of answers, made of the examples; those over the
    length limit, of what is trained on and of what is held out.
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

    train: list[Item]
    evaluation: list[Item]
    audit: Audit
    counts: Counts


def task_of(settings: Training) -> Task:
    """What the rows of this stage are for: of the first kind of settings that these are."""
    return next(task for kind, task in _TASKS.items() if isinstance(settings, kind))


def prepare(
    settings: Training,
    tokenizer: PreTrainedTokenizerBase,
    *,
    eos_token_ids: Collection[int] = (),
    padding_id: int | None = None,
    quarantine: Path | None = None,
) -> Prepared:
    """Reads, encodes, limits, splits and audits.

    eos_token_ids, padding_id: as the model's own settings have them.
    Raises DataError for rows that do not fit and for data that would spoil the run, RecipeError for a stage in rounds.
    """
    if isinstance(settings, IterativeDPO):
        raise RecipeError("a stage in rounds has no data to train on before it samples some; ask about dpo instead")
    reading = _read(settings, settings.data, quarantine)
    if not reading.examples:
        raise DataError(f"{_named(settings.data)}: no usable row among {reading.num_rows}; see what is wrong with each")
    training, held_out = _split(reading.examples, settings)
    if settings.eval_data is not None:
        held_out = _read(settings, settings.eval_data, None).examples
    limited, limited_held_out = (_items(rows, settings, tokenizer, padding_id) for rows in (training, held_out))
    if not limited.kept:
        raise DataError(
            f"{_named(settings.data)}: every sequence is longer than max_length {settings.max_length}; raise it"
        )
    train = _completed(limited.kept, settings, tokenizer)
    found = audit(
        train,
        tokenizer,
        train_on=_train_on(settings),
        max_length=settings.max_length,
        truncated=limited.cut,
        eos_token_ids=eos_token_ids,
    )
    if found.spoiled:
        raise DataError(found.sentence())
    counts = _counts(reading, train, held_out, [limited, limited_held_out])
    return Prepared(train, _evaluation(limited_held_out.kept, settings), found, counts)


def _named(patterns: str | Sequence[str]) -> str:
    return patterns if isinstance(patterns, str) else ", ".join(patterns)


def _read(settings: Training, patterns: str | Sequence[str], quarantine: Path | None) -> Reading:
    return read_examples(
        patterns,
        task=task_of(settings),
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


def _items(
    rows: Rows, settings: Training, tokenizer: PreTrainedTokenizerBase, padding_id: int | None = None
) -> Limited:
    """The encoded rows, held to the length limit."""
    encoded = [item for origin, example in rows for item in _encoded(example, origin, settings, tokenizer, padding_id)]
    if isinstance(settings, Pretrain):
        return Limited([*blocks_of(sequences_of(encoded), settings.max_length)], [], [])
    assert isinstance(settings, OnChats)
    return limit(encoded, settings.max_length, settings.on_long)


def _encoded(
    example: Example, origin: Origin, settings: Training, tokenizer: PreTrainedTokenizerBase, padding_id: int | None
) -> Sequence[Item]:
    if isinstance(settings, Reward):
        assert isinstance(example, Preference)
        return [encode_for_reward(example, origin, tokenizer, padding_id=padding_id)]
    return encode(example, origin, tokenizer, train_on=_train_on(settings) or "all")


def _train_on(settings: Training) -> TrainOn | None:
    """As conversations are encoded and audited; None where no token is learned to end a turn."""
    match settings:
        case Pretrain() | RewardModel():
            return None
        case SFT():
            return settings.train_on
    return "last"


def _completed(train: list[Item], settings: Training, tokenizer: PreTrainedTokenizerBase) -> list[Item]:
    """What is trained on, with what some stages add from other rows."""
    if isinstance(settings, Pretrain):
        return [*mixed(sequences_of(train), _general(settings, tokenizer), settings.mix, settings.seed)]
    if isinstance(settings, KTO):
        groups = _groups(train)
        if len({group.desirable for group in groups}) == 1:
            only = "desirable" if groups[0].desirable else "undesirable"
            raise DataError(
                f"{_named(settings.data)}: all {len(groups)} answers are {only}, and KTO learns from the difference; "
                "add answers of the other kind, or train on good ones with sft"
            )
        return [*with_mismatched(groups, seed=settings.seed, max_length=settings.max_length)]
    return train


def _evaluation(held_out: list[Item], settings: Training) -> list[Item]:
    if not held_out or not isinstance(settings, KTO):
        return held_out
    if len(held_out) == 1:
        raise DataError("KTO compares each held-out answer with another one; hold out two rows or more")
    return [*with_mismatched(_groups(held_out), seed=settings.seed, max_length=settings.max_length)]


def _groups(items: Sequence[Item]) -> list[TokenGroup]:
    return [item for item in items if isinstance(item, TokenGroup)]


def _general(settings: Pretrain, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[TokenSequence]]:
    general = {}
    for name in settings.mix:
        general[name] = sequences_of(_items(_read(settings, name, None).examples, settings, tokenizer).kept)
        if not general[name]:
            raise DataError(f"mix: {name} holds no text; remove it or name another file")
    return general


def _counts(reading: Reading, train: Sequence[Item], held_out: Rows, limited: Sequence[Limited]) -> Counts:
    return Counts(
        rows=reading.num_rows,
        bad=len(reading.bad),
        examples=len(reading.examples),
        sequences=len(train),
        held_out=len(held_out),
        dropped_long=sum(len(one.dropped) for one in limited),
        truncated=sum(len(one.cut) for one in limited),
        tokens=sum(map(len, train)),
        trained_tokens=sum(item.num_trained for item in train),
    )
