"""Answers from a model in memory, many at once, with the very token ids that training sees.

A prompt is read once, however many answers it gets. Answers leave the batch as they end and others join, so a long one
keeps nobody waiting. What an answer's tokens are depends on its prompt and its seed; what else is computed beside it
changes roundings alone. Networks that cannot be decoded so are run by transformers, one prompt after the other.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from luthier.data.batches import pack
from luthier.errors import MemoryPlanError, RecipeError
from luthier.kernels.decoding import Decoding, OwnKeys, PromptPairs
from luthier.models.decode import can_decode, next_logits, read_prompts
from luthier.models.lean import Lean, can_be_lean
from luthier.models.load import Model
from luthier.models.packed import Packing
from luthier.models.score import evaluating
from luthier.rollout.requests import Request, Sample, Sampling
from luthier.rollout.rows import Group, Row, Writer, group_of
from luthier.rollout.scoring import Failure
from luthier.rollout.transformers_engine import write_by_transformers
from luthier.shortage import again_with_less

__all__ = ["LocalEngine"]

logger = logging.getLogger(__name__)

Step = Callable[[Tensor, Decoding], Tensor]
"""The logits of what follows each answer's new token."""

_PROMPT_TOKENS = 4096  # that are read at once
_ENDED_SHARE = 0.25  # of the rows, from which on the others move together


class LocalEngine:
    """Samples answers from a model."""

    def __init__(self, model: Model, *, weights: str = "dense", max_rows: int = 32, fixed: bool = False) -> None:
        """weights: how linear layers are stored meanwhile: dense, or on a CPU fp16 or int8, which are faster and answer
        from a slightly other distribution than the model's; the log-probabilities are those of that distribution.
        max_rows: answers at once. fixed: nobody trains the model, so what is stored is kept. Raises RecipeError where
        the weights cannot be had in this form.
        """
        if max_rows < 1:
            raise RecipeError(f"max_rows: {max_rows} answers at once are none; set 1 or more")
        self.model, self.max_rows = model, max_rows
        self.packing = Packing(model.network, weights, fixed=fixed)
        self.lean = Lean(model.network, weights, fixed=fixed)

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[tuple[Sample, ...] | Failure]:
        """For each request its answers; a Failure for a prompt that is empty or leaves no room in the model's context.

        Where memory runs out, fewer are made at once. Raises RecipeError for a Sampling that leaves nothing to draw,
        ModelError for logits that are not numbers.
        """
        _refuse_senseless(sampling)
        return again_with_less(lambda: self._sample(requests, sampling), self._give_way)

    def _give_way(self, said: str) -> None:
        """Half as many answers at once from now on. Raises MemoryPlanError where it is one already."""
        if self.max_rows == 1:
            raise MemoryPlanError(f"memory has run out with one answer in the making ({said}); lower max_new_tokens")
        self.max_rows //= 2
        logger.warning("memory has run out (%s); going on with %d answers at once", said, self.max_rows)

    def _sample(self, requests: Sequence[Request], sampling: Sampling) -> list[tuple[Sample, ...] | Failure]:
        room = [self._room(request, sampling) for request in requests]
        groups = [
            most if isinstance(most, Failure) else group_of(request, most, sampling)
            for request, most in zip(requests, room, strict=True)
        ]
        writer, fitting = Writer(self.model.tokenizer, sampling), [g for g in groups if isinstance(g, Group)]
        with evaluating(self.model.network), self._stepping() as step, torch.inference_mode():
            if step is not None:
                _Batch(self.model, step, writer, self.max_rows).write(fitting)
            else:
                write_by_transformers(self.model, fitting, writer, self.max_rows)
        return [g if isinstance(g, Failure) else tuple(writer.sample(row) for row in g.rows) for g in groups]

    @contextmanager
    def _stepping(self) -> Iterator[Step | None]:
        """What gives the next logits, with the weights in their form for the time of the context; None where only
        transformers can go on.
        """
        if can_be_lean(self.model.network, self.packing.form):
            self.lean.refresh()
            yield self.lean.next_logits
        else:
            with self.packing.applied():
                yield partial(next_logits, self.model.network) if can_decode(self.model.network) else None

    def _room(self, request: Request, sampling: Sampling) -> int | Failure:
        """The longest answer, in tokens."""
        length = len(request.prompt_ids)
        if not length:
            return Failure("prompt empty", "no token that an answer could follow")
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = sampling.max_new_tokens if context is None else context - length
        if room < 1:
            return Failure("prompt too long", f"{length} tokens for a context of {context}")
        return min(room, sampling.max_new_tokens)


def _refuse_senseless(sampling: Sampling) -> None:
    """Raises RecipeError where no token, or no probability, would be left."""
    fits = {
        "max_new_tokens": sampling.max_new_tokens >= 1,
        "temperature": 0 <= sampling.temperature < float("inf"),
        "top_p": 0 < sampling.top_p <= 1,
        "top_k": sampling.top_k >= 0,
        "min_p": 0 <= sampling.min_p <= 1,
        "repetition_penalty": 0 < sampling.repetition_penalty < float("inf"),
        "stop": all(sampling.stop),
    }
    if wrong := next((name for name, fit in fits.items() if not fit), None):
        raise RecipeError(f"{wrong}: {getattr(sampling, wrong)!r} leaves nothing to sample; give another value")


class _Batch:
    """All answers of a call. `active` are in the making, each in the place of its number; `waiting` not yet begun."""

    def __init__(self, model: Model, step: Step, writer: Writer, max_rows: int) -> None:
        self.model, self.step, self.writer, self.max_rows = model, step, writer, max_rows
        self.waiting: deque[Row] = deque()
        self.active: list[Row] = []

    def write(self, groups: Sequence[Group]) -> None:
        """Brings all their answers to their ends."""
        self.waiting.extend(row for group in groups for row in group.rows)
        self.own = OwnKeys(min(self.max_rows, len(self.waiting)), max((row.most for row in self.waiting), default=0))
        while self.active or self.waiting:
            self._make_room()
            self._admit()
            if any(not row.ended for row in self.active):
                self._go_on()

    def _make_room(self) -> None:
        """Lets go of answers that have ended, once they are many or others wait for their places."""
        ended = [row for row in self.active if row.ended]
        if not ended or (len(ended) < _ENDED_SHARE * len(self.active) and not self.waiting):
            return
        kept = [number for number, row in enumerate(self.active) if not row.ended]
        self.own.keep_only(kept, max((len(self.active[number].tokens) for number in kept), default=0))
        self.active = [self.active[number] for number in kept]
        for row in ended:
            if all(other.ended for other in row.group.rows):
                row.group.keys = None

    def _admit(self) -> None:
        """Begins as many waiting answers as there are places; their first token follows from the prompt."""
        joining = [self.waiting.popleft() for _ in range(min(self.max_rows - len(self.active), len(self.waiting)))]
        self._read({row.group: None for row in joining if row.group.first_logits is None})
        for group, rows in groupby(joining, key=lambda row: row.group):
            assert group.first_logits is not None
            members = list(rows)
            self.writer.extend(members, group.first_logits.repeat(len(members), 1))
            if group.rows[-1] is members[-1]:
                group.first_logits = None
        self.active += joining

    def _read(self, groups: Iterable[Group]) -> None:
        """Reads prompts, some thousand tokens at a time."""
        unread = list(groups)
        for members in pack([len(group.request.prompt_ids) for group in unread], _PROMPT_TOKENS):
            keys, logits = read_prompts(self.model.network, [unread[i].request.prompt_ids for i in members])
            for place, i in enumerate(members):
                unread[i].keys, unread[i].first_logits = keys.of(place), logits[place]

    def _go_on(self) -> None:
        """One more token for each active answer; those that have ended stay as they are."""
        device = self.model.device
        lengths = [len(row.tokens) - 1 for row in self.active]
        positions = [len(row.group.request.prompt_ids) + n for row, n in zip(self.active, lengths, strict=True)]
        decoding = Decoding.of(
            self.own,
            lengths,
            self._prompts(),
            torch.tensor(positions, device=device),
            self.model.dtype,
        )
        last = torch.tensor([row.tokens[-1] for row in self.active], device=device)
        self.writer.extend(self.active, self.step(last, decoding))

    def _prompts(self) -> list[tuple[slice, PromptPairs]]:
        """Which rows go on from which prompt."""
        found: list[tuple[slice, PromptPairs]] = []
        first = 0
        for group, rows in groupby(self.active, key=lambda row: row.group):
            count = sum(1 for _ in rows)
            assert group.keys is not None
            found.append((slice(first, first + count), group.keys))
            first += count
        return found
