"""The output watch: prompts that the model answers at each evaluation, kept for people and looked through for signs.

The answers are the most likely ones, by the engine that rollouts use, so nothing is drawn and the training goes on as
if nobody had asked. They lie in the stage's watched.jsonl. What was there before a step is read from that file, so a
run that goes on says nothing twice, and one that goes back forgets what it takes back.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from luthier.adapters.switch import adapters_off
from luthier.data.batches import TokenBatch, collate
from luthier.data.examples import Chat, Message, Origin
from luthier.data.masks import encode_continuation
from luthier.data.prepare import Prepared
from luthier.data.sequences import TokenSequence, sequences_of
from luthier.errors import ModelError, RecipeError
from luthier.evaluate.signs import SIGNS, Answered, repeated_share, signs_in
from luthier.files import write_whole
from luthier.models.load import Model
from luthier.models.score import evaluating, score
from luthier.pipeline.sealed import read_rows
from luthier.recipe.guards import Watch
from luthier.recipe.preference import RewardModel
from luthier.recipe.training import Pretrain, Training
from luthier.rollout.engine import LocalEngine
from luthier.rollout.generate import request_for
from luthier.rollout.requests import Request, Sample, Sampling
from luthier.rollout.scoring import Failure
from luthier.training.run import Run

__all__ = ["WATCHED", "read_watched", "watch_answers"]

logger = logging.getLogger(__name__)

WATCHED = "watched.jsonl"
_USUAL_SHARE = 0.9  # of the rows, whose answers are shorter than the usual length


def watch_answers(run: Run, prepared: Prepared, model: Model, folder: Path) -> None:
    """Lets the run's evaluations have the prompts answered, where its settings name any. Raises RecipeError for a
    reward model, and DataError for a prompt that cannot be encoded.
    """
    settings = run.settings
    if settings.watch is None:
        return
    if isinstance(settings, RewardModel):
        raise RecipeError("watch: a reward model writes no answers; drop it")
    requests = _requests(settings, settings.watch, model)
    ends = not isinstance(settings, Pretrain) and _usual_length(prepared) <= settings.watch.max_new_tokens
    watcher = _Watcher(run, settings.watch, model, requests, folder / WATCHED, ends)
    measure, evaluation = run.measure, run.evaluation

    def measured(network: nn.Module, batches: Sequence[TokenBatch]) -> dict[str, float]:
        return (measure(network, batches) if measure else {}) | watcher.measured()

    run.measure = measured
    if evaluation is not None:
        run.evaluation = lambda: evaluation() | watcher.measured()


def read_watched(path: Path) -> list[dict[str, Any]]:
    """The rows of watched.jsonl; none where there is no such file. Raises CheckpointError where it is damaged."""
    mend = "delete it: people alone read it"
    return read_rows(path, mend=mend, names=("step", "prompt", "answer")) if path.exists() else []


def _requests(settings: Training, watch: Watch, model: Model) -> list[Request]:
    if isinstance(settings, Pretrain):
        origin = Origin("watch.prompts", 1)
        starts = [encode_continuation(prompt, "", origin, model.tokenizer) for prompt in watch.prompts]
        return [Request(start.token_ids) for start in starts]
    return [request_for(model, Chat((Message("user", prompt),))) for prompt in watch.prompts]


def _usual_length(prepared: Prepared) -> int:
    """Trained tokens that nine of ten rows have no more of."""
    lengths = sorted(sequence.num_trained for sequence in sequences_of(prepared.train))
    return lengths[int(_USUAL_SHARE * (len(lengths) - 1))]


@dataclass(slots=True)
class _Watcher:
    """path: of the file with all answers so far. ends: whether a trained model's answers are to end by themselves."""

    run: Run
    watch: Watch
    model: Model
    requests: Sequence[Request]
    path: Path
    ends: bool

    def measured(self) -> dict[str, float]:
        """Has the prompts answered, writes the answers down and says new signs. Returns means over the answers: the
        share of repeated 4-grams, nats a token by the untrained model, the share that is cut off.
        """
        step, seen = self.run.state.progress.step, self._answers()
        if not seen:
            return {}
        earlier = [row for row in read_watched(self.path) if row["step"] < step]
        rows = [*earlier, *(_row(step, prompt, one) for prompt, one in seen)]
        write_whole(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self._tell(step, earlier, [one for _, one in seen])
        nats = [one.nats for _, one in seen if one.nats is not None]
        return {
            "watch_repeated": fmean(one.repeated for _, one in seen),
            **({"watch_nats": fmean(nats)} if nats else {}),
            "watch_cut_off": fmean(not one.finished for _, one in seen),
        }

    def _answers(self) -> list[tuple[str, Answered]]:
        """Prompts with their answers; none where the model gives no probabilities, which is no reason to end a run."""
        sampling = Sampling(max_new_tokens=self.watch.max_new_tokens)
        try:
            found = LocalEngine(self.model).sample(self.requests, sampling)
        except ModelError as error:
            logger.warning("step %d: the watched prompts get no answers (%s)", self.run.state.progress.step, error)
            return []
        asked = zip(self.watch.prompts, self.requests, found, strict=True)
        return [(prompt, self._seen(request, one[0])) for prompt, request, one in asked if not isinstance(one, Failure)]

    def _seen(self, request: Request, sample: Sample) -> Answered:
        ids = sample.token_ids
        nats = self._untrained_nats(request.prompt_ids, ids)
        return Answered(sample.text, len(ids), sample.finished, repeated_share(ids.tolist()), nats)

    def _untrained_nats(self, prompt: NDArray[np.int32], answer: NDArray[np.int32]) -> float | None:
        """-log p of the answer by the model without its adapter, a token; None where there is no such model, or where
        the answer has tokens that it has not.
        """
        if self.run.settings.adapter is None or not len(answer) or int(answer.max()) >= self._vocabulary():
            return None
        ids = np.concatenate([prompt, answer])
        sequence = TokenSequence(ids, np.arange(len(ids)) >= len(prompt), Origin("watch.prompts", 1))
        network = self.model.network
        with evaluating(network), adapters_off(network):
            nats = -float(score(network, collate([sequence])).logprobs.mean())
        return nats if math.isfinite(nats) else None

    def _vocabulary(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    def _tell(self, step: int, earlier: Sequence[dict[str, Any]], answers: Sequence[Answered]) -> None:
        """Says of each sign once what it means, unless the model had it before its first step."""
        told = {
            sign for number in {row["step"] for row in earlier} for sign in self._signs(number, _of(number, earlier))
        }
        new = self._signs(step, answers) - told
        for sign in [name for name in SIGNS if name in new and step]:
            logger.warning("step %d: most of the %d watched answers %s", step, len(answers), SIGNS[sign])

    def _signs(self, step: int, answers: Sequence[Answered]) -> set[str]:
        """An untrained model need not know where to stop, so that is no sign before the first step."""
        ends = self.ends and step > 0
        return signs_in(answers, vocabulary_nats=math.log(self._vocabulary()), ends_expected=ends)


def _row(step: int, prompt: str, one: Answered) -> dict[str, Any]:
    return {
        "step": step,
        "prompt": prompt,
        "answer": one.text,
        "tokens": one.num_tokens,
        "finished": one.finished,
        "repeated": one.repeated,
        "nats": one.nats,
    }


def _of(step: int, rows: Sequence[dict[str, Any]]) -> list[Answered]:
    return [
        Answered(row["answer"], row["tokens"], row["finished"], row["repeated"], row["nats"])
        for row in rows
        if row["step"] == step
    ]
