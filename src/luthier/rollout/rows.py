"""Answers in the making: which token each takes next, when it ends, and what it is then.

Whoever computes the logits, an answer's draws are made of its request's seed and its place alone, and it ends by the
same rules.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from luthier.data.templates import stop_token_ids
from luthier.errors import ModelError
from luthier.kernels.decoding import PromptPairs
from luthier.rollout.choice import choose
from luthier.rollout.requests import Request, Sample, Sampling

__all__ = ["Group", "Row", "Writer", "group_of"]

_CUT_TOKENS = 4  # that may be needed besides, where the first of a text's last tokens is a part of a letter


@dataclass(eq=False)
class Row:
    """An answer in the making. uniforms: [tokens of the longest answer], in [0, 1): what its draws are made of."""

    group: "Group"
    uniforms: NDArray[np.float64]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False

    @property
    def most(self) -> int:
        """The longest that it may be, in tokens."""
        return len(self.uniforms)

    @property
    def ended(self) -> bool:
        """By itself, or since it is as long as it may be."""
        return self.finished or len(self.tokens) >= self.most


@dataclass(eq=False)
class Group:
    """A request's rows, and its prompt's keys while any of them is in the making."""

    request: Request
    rows: list[Row] = field(default_factory=list)
    keys: PromptPairs | None = None
    first_logits: Tensor | None = None


def group_of(request: Request, most: int, sampling: Sampling) -> Group:
    """most: tokens of the longest answer."""
    group, seeds = Group(request), (sampling.seed % 2**64, request.seed % 2**64)
    for place in range(request.count):
        group.rows.append(Row(group, np.random.default_rng((*seeds, place)).random(most)))
    return group


class Writer:
    """Lets answers go on by a token, and says what they are."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> None:
        self.tokenizer, self.sampling = tokenizer, sampling
        self.stops = stop_token_ids(tokenizer)
        self.tail = max((len(stop.encode()) for stop in sampling.stop), default=0) + _CUT_TOKENS

    def extend(self, rows: Sequence[Row], logits: Tensor) -> None:
        """One more token for each row that has not ended. logits: [rows, vocabulary] float32, of what follows it; used
        up. Raises ModelError where they are not numbers.
        """
        seen = None if self.sampling.repetition_penalty == 1 else _seen(rows, logits)
        drawn = [0.0 if row.ended else row.uniforms[len(row.tokens)] for row in rows]
        tokens, logprobs = choose(logits, torch.tensor(drawn, device=logits.device), self.sampling, seen)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            if row.ended:
                continue
            if math.isnan(logprob):
                raise ModelError(
                    "the model's logits are not numbers (nan), so no token can be drawn; go back to weights "
                    "that are finite"
                )
            row.tokens.append(token)
            row.logprobs.append(logprob)
            row.finished = token in self.stops or self._says_stop(row)

    def _says_stop(self, row: Row) -> bool:
        """Whether one of the texts that end an answer has just been written."""
        if not self.sampling.stop:
            return False
        tail = self.tokenizer.decode(row.tokens[-self.tail :])
        return any(stop in tail for stop in self.sampling.stop)

    def sample(self, row: Row) -> Sample:
        """The answer as it stands."""
        spoken = row.tokens[:-1] if row.tokens[-1] in self.stops else row.tokens
        return Sample(
            np.array(row.tokens, dtype=np.int32),
            np.array(row.logprobs, dtype=np.float32),
            self.tokenizer.decode(spoken).strip(),
            row.finished,
        )


def _seen(rows: Sequence[Row], like: Tensor) -> Tensor:
    """Which tokens stand in each row or its prompt already, [rows, vocabulary]."""
    seen = torch.zeros(like.shape, dtype=torch.bool)
    for place, row in enumerate(rows):
        seen[place, [*row.group.request.prompt_ids.tolist(), *row.tokens]] = True
    return seen.to(like.device)
