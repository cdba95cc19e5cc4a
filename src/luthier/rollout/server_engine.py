"""Answers sampled by a server, as the model in memory would give them: tokens, with log-probabilities where it tells.

Prompts are sent as token ids, many at the same time; a prompt that gets no answers fails alone. Servers stop at the
tokens that training taught to end a turn, and what they draw beyond is cut. Text that comes without tokens is encoded
as training encodes it, which need not be how the server drew it: then, and where a server's log-probabilities are of
another distribution, they are nan, and whoever trains computes them from the tokens.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from luthier.data.dialects import dialect_of
from luthier.data.markers import TextEncoder, text_encoder
from luthier.errors import DataError, RecipeError
from luthier.recipe.rollout_servers import LogprobsMode, RolloutServer, ServerKind
from luthier.rollout.endpoint import WRONG_JSON, Endpoint, is_silence, key_from
from luthier.rollout.patience import Patience
from luthier.rollout.pushing import Pusher, pusher_of
from luthier.rollout.requests import Request, Sample, Sampling
from luthier.rollout.scoring import Failure
from luthier.rollout.server_kinds import NO_ANSWER, SERVERS, Asked, Drawn
from luthier.rollout.workers import workers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ServerEngine", "server_engine"]

_WRONG_ANSWER = "wrong answer"  # the reason of a Failure that is JSON, but no answer of such a server
_MOST_BYTES = 2**28  # of a reply: 64 answers of 16,000 tokens, at 200 bytes a token
_USUAL = Sampling()


@dataclass(slots=True)
class ServerEngine:
    """An `Engine` behind HTTP. ends: the tokens that end an answer; the first stands for an end that is not named.

    parallel: requests at the same time. most_failures: in a row without any reply, before the rest is not asked.
    """

    endpoint: Endpoint
    kind: ServerKind
    encoder: TextEncoder
    ends: tuple[int, ...]
    logprobs_mode: LogprobsMode = "raw_logprobs"
    parallel: int = 16
    most_failures: int = 16
    pusher: Pusher | None = None
    adapter: str | None = field(default=None, init=False)

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[tuple[Sample, ...] | Failure]:
        """For each request its answers, or why there are none, whatever the server does.

        Raises RecipeError for a Sampling that this kind of server does not know.
        """
        if unknown := [name for name in SERVERS[self.kind].lacks if getattr(sampling, name) != getattr(_USUAL, name)]:
            raise RecipeError(f"{unknown[0]}: a server of kind {self.kind} does not know it; leave it out")
        together = SERVERS[self.kind].together
        jobs = [
            (place, self._asked(request, seeds, sampling))
            for place, request in enumerate(requests)
            for seeds in _seeds(request, sampling, together=together)
        ]
        patience = Patience(self.most_failures)
        with workers(self.parallel, "rollout") as pool:
            found = list(pool.map(partial(self._draw, patience), [asked for _, asked in jobs]))
        answers: list[list[Sample | Failure]] = [[] for _ in requests]
        for (place, _), drawn in zip(jobs, found, strict=True):  # here, since tokenizers are not made for threads
            answers[place] += [drawn] if isinstance(drawn, Failure) else [self._sample(one, sampling) for one in drawn]
        return [_whole(of_one) for of_one in answers]

    def push(self, folder: Path, version: int) -> None:
        """Has the server answer with what lies in this folder from now on. Raises what `Pusher.push` raises."""
        if self.pusher is None:
            raise RecipeError(f"push: none leaves {self.endpoint.url} as it is; name what is pushed")
        self.adapter = self.pusher.push(folder, version)

    def _asked(self, request: Request, seeds: list[int], sampling: Sampling) -> Asked:
        return Asked(self.endpoint.model, self.adapter, request.prompt_ids.tolist(), seeds, self.ends, sampling)

    def _draw(self, patience: Patience, asked: Asked) -> list[Drawn] | Failure:
        """The answers of one request to the server, which is sent once more where what came back makes no sense."""
        if patience.is_lost:
            return Failure("not asked", f"{patience.most} requests in a row got no reply")
        found = self._drawn(asked)
        if isinstance(found, Failure) and found.reason in (WRONG_JSON, _WRONG_ANSWER):
            found = self._drawn(asked)
        patience.note(replied=not (isinstance(found, Failure) and is_silence(found)))
        return found

    def _drawn(self, asked: Asked) -> list[Drawn] | Failure:
        server = SERVERS[self.kind]
        endpoint = self.endpoint.beside_v1() if server.native else self.endpoint
        value = endpoint.ask(server.path, server.body(asked))
        if isinstance(value, Failure):
            return value
        try:
            drawn = server.read(value)
        except NO_ANSWER:
            return Failure(_WRONG_ANSWER, f"the reply is not what a server of kind {self.kind} answers")
        if len(drawn) != len(asked.seeds):
            return Failure(_WRONG_ANSWER, f"{len(drawn)} answers came back, {len(asked.seeds)} were asked for")
        fault = next(filter(None, map(self._fault, drawn)), None)
        return drawn if fault is None else Failure(_WRONG_ANSWER, fault)

    def _fault(self, drawn: Drawn) -> str | None:
        """Why this is no answer, in words without the server's own, which may hold anything."""
        if drawn.finish not in ("stop", "length"):
            return "an answer was broken off by the server"
        ids = drawn.token_ids
        if ids is not None and not ((ids >= 0) & (ids < len(self.encoder.tokenizer))).all():
            return f"an answer holds a token that is not among the {len(self.encoder.tokenizer)} of the vocabulary"
        return None

    def _sample(self, drawn: Drawn, sampling: Sampling) -> Sample | Failure:
        try:
            ids, finished = self._tokens(drawn, sampling.stop)
        except DataError as error:
            return Failure(_WRONG_ANSWER, str(error))
        ends = np.flatnonzero(np.isin(ids, self.ends))
        length = int(ends[0]) + 1 if ends.size else len(ids)
        finished = (finished or ends.size > 0) and length <= sampling.max_new_tokens
        ids = ids[: min(length, sampling.max_new_tokens)]
        if not ids.size:
            return Failure(_WRONG_ANSWER, "an answer holds no token")
        text = self.encoder.decode((ids[:-1] if ids[-1] in self.ends else ids).tolist())
        return Sample(ids.astype(np.int32), self._logprobs(drawn, sampling, len(ids)), text, finished)

    def _tokens(self, drawn: Drawn, stop: tuple[str, ...]) -> tuple[NDArray[np.int64], bool]:
        """The tokens of an answer, and whether it ended by itself. Raises DataError for text that nobody can encode."""
        finished = drawn.finish == "stop"
        if drawn.token_ids is not None:
            return drawn.token_ids, finished
        places = [drawn.text.find(text) + len(text) for text in stop if text in drawn.text]
        text = drawn.text[: min(places)] if places else drawn.text
        ids = self.encoder.encode(self.encoder.guard(text), continues=True)
        ids += self.ends[:1] if finished and not places else ()
        return np.asarray(ids, dtype=np.int64), finished or bool(places)

    def _logprobs(self, drawn: Drawn, sampling: Sampling, length: int) -> NDArray[np.float32]:
        told = drawn.logprobs
        if told is None or drawn.token_ids is None or len(told) != len(drawn.token_ids) or np.isnan(told).any():
            return np.full(length, np.nan, np.float32)
        if not SERVERS[self.kind].tells(sampling, self.logprobs_mode):
            return np.full(length, np.nan, np.float32)
        return told[:length]


def server_engine(
    settings: RolloutServer,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    environment: Mapping[str, str] = os.environ,
) -> ServerEngine:
    """The engine by its settings; nothing is asked yet.

    Raises RecipeError for a key that is not there, TemplateError for a chat template that cannot be trained on.
    """
    endpoint = Endpoint(
        settings.url,
        settings.model,
        key=None if settings.api_key_env is None else key_from(environment, settings.api_key_env),
        timeout_seconds=settings.timeout_seconds,
        retries=settings.retries,
        most_bytes=_MOST_BYTES,
    )
    return ServerEngine(
        endpoint,
        settings.kind,
        *_encoder_and_ends(tokenizer),
        logprobs_mode=settings.logprobs_mode,
        parallel=settings.parallel,
        pusher=pusher_of(settings, endpoint),
    )


def _encoder_and_ends(tokenizer: "PreTrainedTokenizerBase") -> tuple[TextEncoder, tuple[int, ...]]:
    """Of the ends, the template's of a plain answer comes first, then its others, then the end of a text."""
    encoder, ends = text_encoder(tokenizer), [tokenizer.eos_token_id]
    if tokenizer.chat_template is not None:
        dialect = dialect_of(tokenizer)
        encoder, ends = dialect.encoder, [*(dialect.encoder.markers[stop] for stop in dialect.stops), *ends]
    return encoder, tuple(dict.fromkeys(end for end in ends if end is not None))


def _seeds(request: Request, sampling: Sampling, *, together: bool) -> list[list[int]]:
    """The seeds of a request's answers, in one piece or one by one; they run on from one that both seeds decide."""
    mixed = np.random.SeedSequence((sampling.seed % 2**64, request.seed % 2**64)).generate_state(1)
    seeds = [int(mixed[0]) // 4 + place for place in range(request.count)]  # below 2^31, as every server wants them
    if together:
        return [seeds] if seeds else []
    return [[seed] for seed in seeds]


def _whole(answers: Iterable[Sample | Failure]) -> tuple[Sample, ...] | Failure:
    """All answers to a request, or the first reason why one of them is not there."""
    samples: list[Sample] = []
    for answer in answers:
        if isinstance(answer, Failure):
            return answer
        samples.append(answer)
    return tuple(samples)
