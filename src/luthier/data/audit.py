"""The audit before step 1: does this data, so tokenized, teach what the run is meant to teach?

It reads finished items, after any truncation, and reports what it finds with a count and one example each.
A finding that would spoil the run stops it; the others are shown. The exactness of each mask is not checked here:
`encode_chat` refuses a conversation whose mask is not exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from luthier.data.dialects import Dialect, dialect_of
from luthier.data.examples import Origin
from luthier.data.markers import TextEncoder, text_encoder
from luthier.data.masks import TrainOn
from luthier.data.sequences import Item, TokenGroup, TokenSequence, sequences_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Audit", "Finding", "Severity", "audit"]

_SPOILING_SHARE = 0.1  # of the sequences; a fault in fewer of them is a warning
_EXCERPT_TOKENS = 24
_FEW, _MANY = 0.1, 0.9  # of the verdicts; beyond them one kind of answer drowns the other
_LONGER = 0.75  # of the rows; in as many the best answer is longer than the worst, or shorter
_ENOUGH = 20  # rows; a share of fewer says little


class Severity(StrEnum):
    """What a finding means for the run."""

    SPOILS = "spoils"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of fault: `num_sequences` (or groups) have it, and one as an example (its origin, and text from it)."""

    severity: Severity
    what: str
    num_sequences: int
    origin: Origin | None = None
    excerpt: str = ""

    def __str__(self) -> str:
        example = f" (as in {self.origin}: {self.excerpt!r})" if self.origin else ""
        return f"{self.severity}: {self.what}{example}"


@dataclass(frozen=True, slots=True)
class Audit:
    """What the audit found, the gravest first, and on how many sequences and tokens it looked."""

    findings: tuple[Finding, ...]
    num_sequences: int
    num_tokens: int
    num_trained: int

    @property
    def spoiled(self) -> bool:
        """Whether any finding would spoil the run."""
        return any(finding.severity is Severity.SPOILS for finding in self.findings)

    def lines(self) -> list[str]:
        """For the screen: the counts, then one line a finding."""
        counts = f"{self.num_sequences} sequences, {self.num_tokens} tokens, {self.num_trained} of them trained"
        return [counts, *map(str, self.findings)]

    def sentence(self) -> str:
        """Why the run must not start, for the error that stops it."""
        spoiling = [str(finding) for finding in self.findings if finding.severity is Severity.SPOILS]
        return f"the data would spoil the run: {'; '.join(spoiling)}"


def audit(
    items: Sequence[Item],
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_on: TrainOn | None,
    max_length: int | None = None,
    truncated: Collection[Origin] = (),
    eos_token_ids: Collection[int] = (),
) -> Audit:
    """Looks through all items for what would spoil the run or surprise its owner.

    train_on: as the sequences were encoded; None for plain text, of which nothing is asked that only chats have.
    max_length: tokens; sequences over it are reported.  truncated: origins that a length limit cut.
    eos_token_ids: at which the model's own generation settings stop; empty if unknown.
    """
    encoder = text_encoder(tokenizer) if train_on is None else dialect_of(tokenizer).encoder
    data = _Data(items, encoder)
    findings = [*_mask_findings(data, train_on), *_length_findings(data, max_length), *_text_findings(data)]
    findings += [*_answer_findings(data), *_verdict_findings(data)]
    if train_on is not None:
        dialect = dialect_of(tokenizer)
        findings += _template_findings(data, dialect, eos_token_ids)
        findings += _ending_findings(data, dialect, train_on, frozenset(truncated))
    order = list(Severity)
    return Audit(
        tuple(sorted(findings, key=lambda finding: order.index(finding.severity))),
        num_sequences=len(data.sequences),
        num_tokens=sum(map(len, items)),
        num_trained=sum(item.num_trained for item in items),
    )


class _Data:
    """The items, and how a fault found in some of them becomes a finding."""

    def __init__(self, items: Sequence[Item], encoder: TextEncoder) -> None:
        self.items = items
        self.encoder = encoder
        self.sequences = sequences_of(items)
        self.groups = [item for item in items if isinstance(item, TokenGroup)]

    def find(
        self, faulty: Sequence[Item], what: str, severity: Severity | None = None, *, at_end: bool = False
    ) -> Iterator[Finding]:
        """A finding, if any is faulty, counted among sequences or among groups; without a severity its share decides
        whether it spoils the run.
        """
        if not faulty:
            return
        total, noun = len(self.sequences), "sequences"
        if isinstance(faulty[0], TokenGroup):
            total, noun = len(self.groups), "rows"
        by_share = Severity.SPOILS if len(faulty) > _SPOILING_SHARE * total else Severity.WARNING
        ids = sequences_of(faulty[:1])[0].token_ids.tolist()
        excerpt = self.encoder.decode(ids[-_EXCERPT_TOKENS:] if at_end else ids[:_EXCERPT_TOKENS])
        sentence = f"{len(faulty)} of {total} {noun} {what}"
        yield Finding(severity or by_share, sentence, len(faulty), faulty[0].origin, excerpt)


def _mask_findings(data: _Data, train_on: TrainOn | None) -> Iterator[Finding]:
    if not data.sequences:
        yield Finding(Severity.SPOILS, "there are no sequences", 0)
    yield from data.find([one for one in data.sequences if not one.num_trained], "have no trained token")
    if train_on in ("assistant", "last"):
        full = [one for one in data.sequences if 1 < len(one) == one.num_trained + 1]
        yield from data.find(full, "train the prompt as well as the answer")


def _length_findings(data: _Data, max_length: int | None) -> Iterator[Finding]:
    if max_length is not None:
        long = [one for one in data.sequences if len(one) > max_length]
        yield from data.find(long, f"are longer than {max_length} tokens", Severity.WARNING)


def _text_findings(data: _Data) -> Iterator[Finding]:
    tokenizer, total = data.encoder.tokenizer, len(data.items)
    bos = tokenizer.bos_token_id
    doubled = [one for one in data.sequences if bos is not None and one.token_ids[:2].tolist() == [bos, bos]]
    yield from data.find(doubled, f"begin with {tokenizer.bos_token!r} twice", Severity.WARNING)
    spelled = [one for one in data.sequences if data.encoder.imitations(one.token_ids.tolist())]
    yield from data.find(spelled, "spell special tokens in their text, which are kept as plain text", Severity.NOTE)
    if repeated := total - len(set(map(_content, data.items))):
        noun = "rows" if data.groups else "sequences"
        what = f"{repeated} of {total} {noun} ({repeated / total:.0%}) repeat another"
        yield Finding(Severity.NOTE, what, repeated)


def _content(item: Item) -> tuple[object, ...]:
    """What makes two items one and the same to a run."""
    verdict = item.desirable if isinstance(item, TokenGroup) else None
    return verdict, *((one.token_ids.tobytes(), one.trained.tobytes()) for one in sequences_of([item]))


def _answer_findings(data: _Data) -> Iterator[Finding]:
    """Of two and more answers to one prompt: whether they differ, and whether by more than their length."""
    compared = [group for group in data.groups if len(group.sequences) > 1]
    distinct = [len({answer.token_ids.tobytes() for answer in one.sequences}) for one in compared]
    same = [one for one, number in zip(compared, distinct, strict=True) if number < len(one.sequences)]
    yield from data.find(same, "have answers that become the same tokens, so that none can be preferred")
    gaps = [one.sequences[0].num_trained - one.sequences[-1].num_trained for one in compared]
    uneven = len(gaps) - gaps.count(0)
    for word, number in (("longer", sum(gap > 0 for gap in gaps)), ("shorter", sum(gap < 0 for gap in gaps))):
        if uneven >= _ENOUGH and number > _LONGER * uneven:
            what = (
                f"in {number} of {uneven} rows whose answers differ in length ({number / uneven:.0%}) the best is "
                f"{word} than the worst, so length alone can be learned; compare lengths of answers before and after"
            )
            yield Finding(Severity.NOTE, what, number)


def _verdict_findings(data: _Data) -> Iterator[Finding]:
    judged = [group.desirable for group in data.groups if group.desirable is not None]
    share = sum(judged) / max(1, len(judged))
    if judged and not _FEW <= share <= _MANY:
        setting = "desirable_weight" if share < _FEW else "undesirable_weight"
        what = (
            f"{sum(judged)} of {len(judged)} answers ({share:.0%}) are desirable; "
            f"raise {setting} until both kinds weigh alike"
        )
        yield Finding(Severity.WARNING, what, sum(judged))


def _template_findings(data: _Data, dialect: Dialect, eos_token_ids: Collection[int]) -> Iterator[Finding]:
    total, stops = len(data.sequences), " and ".join(map(repr, dialect.stops))
    if not dialect.stops:
        yield Finding(Severity.SPOILS, "the chat template writes no end-of-turn token; add eos_token to it", total)
    elif eos_token_ids and not dialect.stop_ids <= set(eos_token_ids):
        ends = " and ".join(repr(dialect.encoder.decode([index])) for index in sorted(eos_token_ids))
        what = f"the template ends a turn with {stops}, but the model's generation settings stop at {ends}"
        yield Finding(Severity.WARNING, what, total)
    alone = [item for item in data.items if not isinstance(item, TokenGroup)]
    origins = Counter(one.origin for one in alone)
    split = [one for one in alone if origins[one.origin] > 1]
    num_split = len({one.origin for one in split})
    what = (
        f"come from {num_split} conversations whose earlier turns the template shows otherwise later: one for each turn"
    )
    yield from data.find(split, what, Severity.NOTE)
    if dialect.default_system:
        what = f"where a conversation has no system turn the template adds {dialect.default_system!r}"
        yield Finding(Severity.NOTE, what, total)


def _ending_findings(
    data: _Data, dialect: Dialect, train_on: TrainOn, truncated: frozenset[Origin]
) -> Iterator[Finding]:
    """Every run of trained tokens has to end with an end-of-turn token, or the model does not learn to stop."""
    stop_ids = list(dialect.stop_ids)
    cut = [one for one in data.sequences if one.origin in truncated and not _ends_turns(one, stop_ids)]
    yield from data.find(cut, "have an answer that the length limit cuts off", at_end=True)
    whole = [one for one in data.sequences if one.origin not in truncated]
    if train_on == "all":  # a conversation may end with a question
        endless = [one for one in whole if not np.isin(one.token_ids[one.trained], stop_ids).any()]
    else:
        endless = [one for one in whole if not _ends_turns(one, stop_ids)]
    what = "do not train the end-of-turn token, so the model would not learn to stop"
    yield from data.find(endless, what, Severity.SPOILS, at_end=True)


def _ends_turns(sequence: TokenSequence, stop_ids: list[int]) -> bool:
    """Whether each run of trained tokens ends with a stop token; true of a sequence without any."""
    last_of_run = sequence.trained & ~np.append(sequence.trained[1:], False)
    return bool(np.isin(sequence.token_ids[last_of_run], stop_ids).all())
