"""Prompts that a stage learns on by answering them: read, encoded, held to the length limit, split.

When memory is planned, answers do not exist yet, but none will be longer than `max_new_tokens`: a stand-in of that
length takes the place of each prompt's.
"""

import hashlib
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from luthier.data.audit import Audit
from luthier.data.encoding import encode
from luthier.data.examples import Example, Origin, Prompt
from luthier.data.prepare import Counts, Prepared
from luthier.data.reading import Reading, read_examples
from luthier.data.sequences import Item, TokenGroup, TokenSequence
from luthier.errors import DataError
from luthier.recipe.policy import OnPolicy

__all__ = ["Asked", "PreparedPrompts", "answered", "digest_of_prompts", "distinct", "prepare_prompts"]

logger = logging.getLogger(__name__)


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
    """Raises DataError for rows that do not fit, and where no prompt is left to learn or to be evaluated on."""
    reading = _read(settings, settings.data, quarantine)
    chosen = _distinct_rows(_prompts_in(reading))
    if settings.eval_data is not None:
        held_out = _distinct_rows(_prompts_in(_read(settings, settings.eval_data, None)))
        training = _distinct_rows(chosen, besides=[prompt for _, prompt in held_out])
    else:
        training, held_out = map(list, _split(chosen, settings))
    if repeated := len(reading.examples) - len(training) - (0 if settings.eval_data else len(held_out)):
        logger.info("%d rows repeat a prompt, or one that is held out, and are left out", repeated)
    asked, dropped = _encoded(training, settings, tokenizer)
    evaluated, dropped_held_out = _encoded(held_out, settings, tokenizer)
    for left, purpose in ((asked, "learn"), (evaluated, "be evaluated")):
        if not left and (purpose == "learn" or settings.eval_every):
            raise DataError(
                f"{settings.data}: no prompt of {reading.num_rows} rows is left to {purpose} on; raise max_length, "
                "which a prompt and max_new_tokens have to fit in, or give other data"
            )
    train: list[Item] = [_stand_in(one, settings) for one in asked]
    tokens, trained = sum(map(len, train)), sum(item.num_trained for item in train)
    counts = Counts(
        *(reading.num_rows, len(reading.bad), len(reading.examples), len(asked), len(evaluated)),
        *(dropped + dropped_held_out, 0, tokens, trained),
    )
    return PreparedPrompts(train, [], Audit((), len(train), tokens, trained), counts, asked, evaluated)


def answered(stand_in: TokenSequence, count: int, *, most_tokens: int | None = None) -> TokenGroup:
    """A prompt's stand-in as a group of so many answers, of which no two begin alike.

    most_tokens: of the group, at least 2; its last answers are then shorter, or missing. A prompt that would leave
    answers less than half of the room, and less than they need, is cut.
    """
    prompt = int(stand_in.trained.argmax())
    longest = len(stand_in) - prompt
    left = wanted = count * longest
    if most_tokens is not None:
        kept = min(prompt, max(most_tokens // 2, most_tokens - wanted))
        stand_in, prompt, left = stand_in.part(slice(prompt - kept, None)), kept, min(wanted, most_tokens - kept)
    answers: list[TokenSequence] = []
    for first in range(0, left, longest):
        answer = stand_in.part(slice(prompt + min(longest, left - first)))
        ids = answer.token_ids.copy()
        ids[prompt] = len(answers)
        answers.append(replace(answer, token_ids=ids))
    return TokenGroup(tuple(answers))


def digest_of_prompts(prepared: PreparedPrompts) -> str:
    """Of all that decides what is asked and what rewards may read of it: the prompts' tokens, words and rows."""
    digest = hashlib.sha256()
    for part in (prepared.prompts, prepared.held_out):
        digest.update(f"{len(part)} prompts".encode())
        for one in part:
            digest.update(one.token_ids.tobytes())
            digest.update(repr(one.prompt).encode())
    return digest.hexdigest()


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
    room = settings.max_length - settings.max_new_tokens
    long = [item for item in items if len(item) > room]
    if long and settings.on_long == "error":
        raise DataError(
            f"{long[0].origin}: a prompt of {len(long[0])} tokens leaves no room for max_new_tokens "
            f"{settings.max_new_tokens} in max_length {settings.max_length}, as {len(long)} prompts do; raise "
            "max_length or choose on_long: drop"
        )
    kept = [item for item in items if isinstance(item, TokenSequence) and len(item) <= room]
    return [Asked(prompts[item.origin], item.token_ids, item.origin) for item in kept], len(long)


def _stand_in(asked: Asked, settings: OnPolicy) -> TokenSequence:
    """The prompt with the longest answer."""
    ids = np.concatenate([asked.token_ids, np.zeros(settings.max_new_tokens, dtype=np.int32)])
    return TokenSequence(ids, np.arange(len(ids)) >= len(asked.token_ids), asked.origin)
