"""The forgetting guard: what training takes away from a model is measured on general text and questions, and bounded.

At each evaluation, the one before the first step among them, the perplexity on that text and the accuracy on those
questions are measured and compared with the first. A small loss is told, a greater one warned of once, and over the
bound the run ends and goes back to its best checkpoint, as any guard makes it. The first perplexity, and which
questions were answered rightly, lie in the stage's folder, so that a run that goes on compares with the same model.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier.data.batches import TokenBatch, cut, pass_sizes
from luthier.data.blocks import blocks_of
from luthier.data.encoding import encode
from luthier.data.questions import encode_question, read_questions
from luthier.data.reading import read_examples
from luthier.data.sequences import Item, TokenGroup, TokenSequence, sequences_of
from luthier.errors import CheckpointError, DataError, RecipeError, TrainingError
from luthier.evaluate.choices import answered_rightly
from luthier.evaluate.significance import Fall, fall_between
from luthier.pipeline.methods import next_tokens
from luthier.pipeline.sealed import read_sealed, write_sealed
from luthier.recipe.guards import Forgetting
from luthier.recipe.preference import RewardModel
from luthier.recipe.training import Training
from luthier.training.loop import evaluate_loss
from luthier.training.run import Run

__all__ = ["General", "general_data", "watch_forgetting"]

logger = logging.getLogger(__name__)

_BLOCK_TOKENS = 512  # fixed, so that no perplexity depends on the memory there is
_MEND = "lower learning_rate or epochs, or mix general text into the data"


@dataclass(frozen=True, slots=True)
class General:
    """What is measured on. num_characters: of each question's choices."""

    text: list[TokenSequence] = field(default_factory=list)
    questions: list[TokenGroup] = field(default_factory=list)
    num_characters: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def items(self) -> list[Item]:
        """All of it."""
        return [*self.text, *self.questions]


def general_data(settings: Training, tokenizer: PreTrainedTokenizerBase) -> General:
    """What the guard's settings name, encoded; nothing where there are none.

    Raises RecipeError for a reward model, which gives no token a probability, and DataError for files without text, or
    without questions that fit into max_length.
    """
    guard = settings.forgetting
    if guard is None:
        return General()
    if isinstance(settings, RewardModel):
        raise RecipeError("forgetting: a reward model gives no text a probability; drop it")
    text = _text(settings, guard.text, guard.tokens, tokenizer) if guard.text is not None else []
    if guard.questions is None:
        return General(text)
    asked = read_questions(guard.questions)
    encoded = [(encode_question(one, tokenizer), tuple(map(len, one.choices))) for one in asked]
    fitting = [one for one in encoded if max(map(len, one[0].sequences)) <= settings.max_length]
    if not fitting:
        raise DataError(f"forgetting.questions: none of {len(asked)} fits into max_length {settings.max_length}")
    if missing := len(asked) - len(fitting):
        logger.info("forgetting: %d of %d questions are longer than max_length and left out", missing, len(asked))
    number = min(guard.num_questions, len(fitting))
    chosen = [fitting[i * len(fitting) // number] for i in range(number)]
    return General(text, [group for group, _ in chosen], [lengths for _, lengths in chosen])


def _text(
    settings: Training, files: str | Sequence[str], num_tokens: int, tokenizer: PreTrainedTokenizerBase
) -> list[TokenSequence]:
    """The first tokens of the files, in blocks."""
    reading = read_examples(files, format="text", on_error=settings.on_error)
    documents: list[TokenSequence] = []
    left = num_tokens
    for origin, example in reading.examples:
        (document,) = sequences_of(encode(example, origin, tokenizer, train_on="all"))
        documents.append(TokenSequence(document.token_ids[:left], document.trained[:left], origin))
        left -= len(documents[-1])
        if not left:
            break
    blocks = blocks_of(documents, min(_BLOCK_TOKENS, settings.max_length))
    if not any(block.num_trained for block in blocks):
        raise DataError(f"forgetting.text: {files} holds no text; name other files")
    return blocks


def watch_forgetting(run: Run, general: General, folder: Path) -> None:
    """Lets the run's evaluations measure on this too, and its guard ask for it, besides what it did before.

    The first measurement is kept in `folder`. Raises CheckpointError, once the run goes on, where it is not there.
    """
    assert run.settings.forgetting is not None
    watch = _Watch(run, run.settings.forgetting, general, folder / "forgetting.json")
    measure, evaluation, guard = run.measure, run.evaluation, run.guard

    def measured(network: nn.Module, batches: Sequence[TokenBatch]) -> dict[str, float]:
        return (measure(network, batches) if measure else {}) | watch.measured()

    def guarded(found: dict[str, float]) -> str | None:
        reason = watch.refused(found)
        return (guard(found) if guard else None) or reason

    run.measure, run.guard = measured, guarded
    if evaluation is not None:
        run.evaluation = lambda: evaluation() | watch.measured()


@dataclass(slots=True)
class _Watch:
    """path: of the file with the first measurement. fall: of the accuracy, at the last one."""

    run: Run
    guard: Forgetting
    general: General
    path: Path
    fall: Fall = field(default=Fall(0.0, 0.0), init=False)
    warned: set[str] = field(default_factory=set, init=False)

    def measured(self) -> dict[str, float]:
        """The perplexity and its rise as a share of the first, the accuracy and its fall in points of 1, as far as they
        are asked for. Raises TrainingError where the first perplexity is no number.
        """
        room, general = self.run.room, self.general
        loss = room.fitting(self._loss, lambda: pass_sizes(general.text, room.tokens)) if general.text else None
        rightly = (
            room.fitting(self._answered, lambda: pass_sizes(general.questions, room.tokens))
            if general.questions
            else []
        )
        now = {} if loss is None else {"perplexity": math.exp(min(loss, 700.0))}
        if self.run.state.progress.step == 0:
            if loss is not None and not math.isfinite(loss):
                raise TrainingError(f"forgetting.text: the untrained model's loss on it is {loss}; set dtype: fp32")
            write_sealed(self.path, {**now, "rightly": [int(one) for one in rightly]})
        first, told = self._first(), {}
        if now:
            told["forgetting_perplexity"] = now["perplexity"]
            told["forgetting"] = now["perplexity"] / first["perplexity"] - 1
        if rightly:
            self.fall = fall_between([bool(one) for one in first["rightly"]], rightly)
            told["general_accuracy"] = sum(rightly) / len(rightly)
            told["general_accuracy_fall"] = self.fall.fall
        return told

    def _loss(self) -> float:
        return evaluate_loss(self.run.state.network, cut(self.general.text, self.run.room.tokens), next_tokens)

    def _answered(self) -> list[bool]:
        network, general = self.run.state.network, self.general
        assert isinstance(network, PreTrainedModel)
        return answered_rightly(network, general.questions, general.num_characters, self.run.room.tokens)

    def _first(self) -> dict[str, Any]:
        mend = "nobody knows the model before training; start afresh with resume: false, or drop forgetting"
        first = read_sealed(self.path, mend=mend)
        if len(first["rightly"]) != len(self.general.questions) or ("perplexity" in first) != bool(self.general.text):
            raise CheckpointError(f"{self.path}: is of another guard, so {mend}")
        return first

    def refused(self, measured: dict[str, float]) -> str | None:
        """Why the run has to end; warns once of each loss that is only on the way there."""
        return self._refused_perplexity(measured) or self._refused_accuracy(measured)

    def _refused_perplexity(self, measured: dict[str, float]) -> str | None:
        found = measured.get("forgetting")
        if found is None:
            return None
        perplexity = measured["forgetting_perplexity"]
        risen = f"the perplexity on forgetting.text has risen to {perplexity:.2f}, by {found:.1%}"
        if not found <= self.guard.stop:  # nan too
            return f"{risen}, over forgetting.stop {self.guard.stop:g} ({_MEND})"
        self._warn("perplexity", risen, found > self.guard.warn)
        return None

    def _refused_accuracy(self, measured: dict[str, float]) -> str | None:
        found = measured.get("general_accuracy")
        if found is None:
            return None
        fallen = (
            f"the accuracy on forgetting.questions has fallen to {found:.1%}, by {100 * self.fall.fall:.1f} points "
            f"(standard error {100 * self.fall.error:.1f})"
        )
        if self.fall.is_over(self.guard.accuracy_stop):
            return f"{fallen}, over forgetting.accuracy_stop {self.guard.accuracy_stop:g} ({_MEND})"
        self._warn("accuracy", fallen, self.fall.is_over(self.guard.accuracy_warn))
        return None

    def _warn(self, kind: str, sentence: str, is_over: bool) -> None:
        if is_over and kind not in self.warned:
            self.warned.add(kind)
            logger.warning("step %d: %s; %s", self.run.state.progress.step, sentence, _MEND)
