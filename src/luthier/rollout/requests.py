"""What an engine is asked and what it answers: prompts as tokens in, sampled tokens with their log-probabilities out.

An engine is whatever keeps this contract: the model in memory, or a server. Draws belong to a request's seed and the
answer's place in it, never to what else is computed at the same time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from luthier.rollout.scoring import Failure

__all__ = ["Engine", "Request", "Sample", "Sampling"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen.

    temperature: divides the logits; 0 takes the most likely token. top_k: only so many of the most likely, 0 for all.
    top_p: only the most likely that together have this probability. min_p: only those with this share of the most
    likely one's probability. repetition_penalty: divides the positive logits of tokens that were there already, and
    multiplies the negative ones (Keskar et al. 2019, section 4.1). stop: texts that end an answer, and stand in it.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 42


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A prompt and how many answers to it. prompt_ids: [tokens] int32. seed: decides, with Sampling's, the draws."""

    prompt_ids: NDArray[np.int32]
    count: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """An answer. token_ids: [tokens] int32, with the one that ended it. text: without that.

    logprobs: [tokens] float32, in nats: of each token by the model's distribution at the temperature (1 where that is
    0), before top_k, top_p, min_p and repetition_penalty cut it; all nan where the engine cannot tell them. finished:
    it ended by itself, and not because it was as long as it may be.
    """

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    text: str
    finished: bool


class Engine(Protocol):
    """Samples answers."""

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[tuple[Sample, ...] | Failure]:
        """For each request its answers, `count` of them, or why there are none.

        Raises RecipeError for a Sampling that the engine cannot follow.
        """
        ...
