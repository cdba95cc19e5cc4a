"""Answers from a model in memory, many at once, with the very token ids that training sees.

A prompt is read once, however many answers it gets. Answers leave the batch as they end and others join, so a long one
keeps nobody waiting. What an answer's tokens are depends on its prompt and its seed; what else is computed beside it
changes roundings alone. Networks that cannot be decoded so are run by transformers, one prompt after the other.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from luthier.data.batches import pack
from luthier.data.templates import stop_token_ids
from luthier.kernels.decoding import Decoding, OwnKeys, PromptPairs
from luthier.models.decode import can_decode, next_logits, read_prompts
from luthier.models.load import Model
from luthier.models.packed import Packing
from luthier.models.score import evaluating
from luthier.rollout.choice import choose, penalized
from luthier.rollout.requests import Request, Sample, Sampling
from luthier.rollout.scoring import Failure
from luthier.rollout.transformers_engine import sample_by_transformers

__all__ = ["LocalEngine"]

_PROMPT_TOKENS = 4096  # that are read at once
_ENDED_SHARE = 0.25  # of the rows, from which on the others move together


class LocalEngine:
    """Samples answers from a model."""

    def __init__(self, model: Model, *, weights: str = "dense", max_rows: int = 32) -> None:
        """weights: how linear layers are stored meanwhile: dense, or on a CPU fp16 or int8, which are faster and answer
        from a slightly other distribution than the model's; the log-probabilities are those of that distribution.
        max_rows: answers at once. Raises RecipeError where the weights cannot be had in this form.
        """
        self.model, self.max_rows = model, max_rows
        self.packing = Packing(model.network, weights)

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[tuple[Sample, ...] | Failure]:
        """For each request its answers; a Failure for a prompt that leaves no room in the model's context."""
        room = [self._room(request, sampling) for request in requests]
        fitting = [
            (request, most) for request, most in zip(requests, room, strict=True) if not isinstance(most, Failure)
        ]
        with evaluating(self.model.network), self.packing.applied(), torch.inference_mode():
            if can_decode(self.model.network):
                found = _Batch(self.model, sampling, self.max_rows).answers(fitting)
            else:
                found = sample_by_transformers(self.model, fitting, sampling)
        remaining = iter(found)
        return [most if isinstance(most, Failure) else next(remaining) for most in room]

    def _room(self, request: Request, sampling: Sampling) -> int | Failure:
        """The longest answer, in tokens."""
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = sampling.max_new_tokens if context is None else context - len(request.prompt_ids)
        if room < 1:
            return Failure("prompt too long", f"{len(request.prompt_ids)} tokens for a context of {context}")
        return min(room, sampling.max_new_tokens)


@dataclass(eq=False)
class _Row:
    """An answer in the making."""

    group: "_Group"
    uniforms: NDArray[np.float64]
    most: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False

    @property
    def ended(self) -> bool:
        return self.finished or len(self.tokens) >= self.most


@dataclass(eq=False)
class _Group:
    """A request's rows, and its prompt's keys while any of them is in the making."""

    request: Request
    rows: list[_Row] = field(default_factory=list)
    keys: PromptPairs | None = None
    first_logits: Tensor | None = None


class _Batch:
    """All answers of a call. `active` are in the making, each in the place of its number; `waiting` not yet begun."""

    def __init__(self, model: Model, sampling: Sampling, max_rows: int) -> None:
        self.model, self.sampling, self.max_rows = model, sampling, max_rows
        self.stops = stop_token_ids(model.tokenizer)
        self.waiting: deque[_Row] = deque()
        self.active: list[_Row] = []

    def answers(self, requests: Sequence[tuple[Request, int]]) -> list[tuple[Sample, ...]]:
        """requests: with the longest answer of each."""
        groups = [_group(request, most, self.sampling) for request, most in requests]
        self.waiting.extend(row for group in groups for row in group.rows)
        longest = max((most for _, most in requests), default=0)
        self.own = OwnKeys(min(self.max_rows, len(self.waiting)), longest)
        while self.active or self.waiting:
            self._make_room()
            self._admit()
            if any(not row.ended for row in self.active):
                self._step()
        return [tuple(self._sample(row) for row in group.rows) for group in groups]

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
            self._choose(members, group.first_logits.repeat(len(members), 1))
            if group.rows[-1] is members[-1]:
                group.first_logits = None
        self.active += joining

    def _read(self, groups: Iterable["_Group"]) -> None:
        """Reads prompts, some thousand tokens at a time."""
        unread = list(groups)
        for members in pack([len(group.request.prompt_ids) for group in unread], _PROMPT_TOKENS):
            keys, logits = read_prompts(self.model.network, [unread[i].request.prompt_ids for i in members])
            for place, i in enumerate(members):
                unread[i].keys, unread[i].first_logits = keys.of(place), logits[place]

    def _step(self) -> None:
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
        self._choose(self.active, next_logits(self.model.network, last, decoding))

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

    def _choose(self, rows: Sequence[_Row], logits: Tensor) -> None:
        if self.sampling.repetition_penalty != 1:
            logits = penalized(logits, self._seen(rows, logits), self.sampling.repetition_penalty)
        drawn = [0.0 if row.ended else row.uniforms[len(row.tokens)] for row in rows]
        tokens, logprobs = choose(logits, torch.tensor(drawn, device=logits.device), self.sampling)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            if not row.ended:
                row.tokens.append(token)
                row.logprobs.append(logprob)
                row.finished = token in self.stops or self._says_stop(row)

    def _seen(self, rows: Sequence[_Row], like: Tensor) -> Tensor:
        seen = torch.zeros(like.shape, dtype=torch.bool)
        for place, row in enumerate(rows):
            seen[place, [*row.group.request.prompt_ids.tolist(), *row.tokens]] = True
        return seen.to(like.device)

    def _says_stop(self, row: _Row) -> bool:
        """Whether one of the texts that end an answer has just been written."""
        if not self.sampling.stop:
            return False
        tail = self.model.tokenizer.decode(row.tokens[-max(map(len, self.sampling.stop)) - 4 :])
        return any(stop in tail for stop in self.sampling.stop)

    def _sample(self, row: _Row) -> Sample:
        spoken = row.tokens[:-1] if row.tokens[-1] in self.stops else row.tokens
        return Sample(
            np.array(row.tokens, dtype=np.int32),
            np.array(row.logprobs, dtype=np.float32),
            self.model.tokenizer.decode(spoken).strip(),
            row.finished,
        )


def _group(request: Request, most: int, sampling: Sampling) -> _Group:
    group = _Group(request)
    for place in range(request.count):
        generator = np.random.default_rng((sampling.seed, request.seed, place))
        group.rows.append(_Row(group, generator.random(most), most))
    return group
