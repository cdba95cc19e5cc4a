"""Prompts that a stage learns on by answering them: read, encoded, held to the length limit, split.

When memory is planned, answers do not exist yet, but none will be longer than `max_new_tokens`: a stand-in of that
length takes the place of each prompt's.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from luthier.data.audit import Audit
from luthier.data.encoding import encode
from luthier.data.examples import Example, Origin, Prompt
from luthier.data.limits import limit
from luthier.data.prepare import Counts, Prepared
from luthier.data.reading import Reading, read_examples
from luthier.data.sequences import Item, TokenSequence
from luthier.errors import DataError
from luthier.recipe.policy import OnPolicy

__all__ = ["Asked", "PreparedPrompts", "distinct", "prepare_prompts"]


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A prompt and its tokens, [tokens] int32."""

    prompt: Prompt
    token_ids: NDArray[np.int32]
    origin: Origin


@dataclass(frozen=True, slots=True)
class PreparedPrompts(Prepared):
    """What a policy learns on and is evaluated on. train, evaluation: stand-ins, and nothing."""

    prompts: list[Asked]
    held_out: list[Asked]


def prepare_prompts(settings: OnPolicy, tokenizer: PreTrainedTokenizerBase, *, quarantine: Path) -> PreparedPrompts:
    """Raises DataError for rows that do not fit, and where no prompt is left."""
    reading = _read(settings, settings.data, quarantine)
    chosen = _distinct_rows(_prompts_in(reading))
    if settings.eval_data is not None:
        held_out = _distinct_rows(_prompts_in(_read(settings, settings.eval_data, None)))
        training = _distinct_rows(chosen, besides=[prompt for _, prompt in held_out])
    else:
        training, held_out = map(list, _split(chosen, settings))
    asked, dropped = _encoded(training, settings, tokenizer)
    evaluated, _ = _encoded(held_out, settings, tokenizer)
    if not asked:
        raise DataError(
            f"{settings.data}: no prompt of {reading.num_rows} rows is left to learn on; raise max_length, which a "
            "prompt and its answer have to fit in, or give other data"
        )
    train: list[Item] = [_stand_in(one, settings) for one in asked]
    tokens, trained = sum(map(len, train)), sum(item.num_trained for item in train)
    counts = Counts(
        *(reading.num_rows, len(reading.bad), len(reading.examples), len(asked), len(held_out), dropped, 0),
        *(tokens, trained),
    )
    return PreparedPrompts(train, [], Audit((), len(train), tokens, trained), counts, asked, evaluated)


def distinct(prompts: Sequence[Prompt], *, besides: Sequence[Prompt] = ()) -> list[Prompt]:
    """The prompts that say something else than those before them and those besides, so that none is trained on and
    compared on.
    """
    nowhere = Origin("", 0)
    return [prompt for _, prompt in _distinct_rows([(nowhere, prompt) for prompt in prompts], besides=besides)]


Rows = Sequence[tuple[Origin, Prompt]]


def _distinct_rows(rows: Rows, *, besides: Collection[Prompt] = ()) -> list[tuple[Origin, Prompt]]:
    seen = {repr((prompt.messages, prompt.tools)) for prompt in besides}
    kept: list[tuple[Origin, Prompt]] = []
    for origin, prompt in rows:
        said = repr((prompt.messages, prompt.tools))
        if said not in seen:
            kept.append((origin, prompt))
        seen.add(said)
    return kept


def _read(settings: OnPolicy, patterns: str | Sequence[str], quarantine: Path | None) -> Reading:
    return read_examples(
        patterns,
        task="ask",
        format=settings.format,
        columns=settings.columns,
        on_error=settings.on_error,
        quarantine=quarantine,
    )


def _prompts_in(reading: Reading) -> list[tuple[Origin, Prompt]]:
    examples: Sequence[tuple[Origin, Example]] = reading.examples
    return [(origin, example) for origin, example in examples if isinstance(example, Prompt)]


def _split(rows: Rows, settings: OnPolicy) -> tuple[Rows, Rows]:
    """Held out are the rows that the seed draws."""
    if not settings.eval_fraction:
        return rows, []
    number = max(1, round(settings.eval_fraction * len(rows)))
    if number >= len(rows):
        raise DataError(f"eval_fraction leaves nothing to train on of {len(rows)} prompts; lower it")
    chosen = set(np.random.default_rng(settings.seed).permutation(len(rows))[:number].tolist())
    return [r for i, r in enumerate(rows) if i not in chosen], [r for i, r in enumerate(rows) if i in chosen]


def _encoded(rows: Rows, settings: OnPolicy, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Asked], int]:
    """The prompts that leave room for an answer, and how many do not. Raises DataError where on_long says so."""
    prompts = dict(rows)
    items = [item for origin, prompt in rows for item in encode(prompt, origin, tokenizer, train_on="last")]
    limited = limit(items, settings.max_length - 1, settings.on_long)
    kept = [item for item in limited.kept if isinstance(item, TokenSequence)]
    return [Asked(prompts[item.origin], item.token_ids, item.origin) for item in kept], len(limited.dropped)


def _stand_in(asked: Asked, settings: OnPolicy) -> TokenSequence:
    """The prompt with the longest answer."""
    length = min(settings.max_new_tokens, settings.max_length - len(asked.token_ids))
    ids = np.concatenate([asked.token_ids, np.zeros(length, dtype=np.int32)])
    return TokenSequence(ids, np.arange(len(ids)) >= len(asked.token_ids), asked.origin)
