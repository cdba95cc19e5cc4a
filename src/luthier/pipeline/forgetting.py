"""The forgetting guard: what training takes away from a model is measured on general text, and bounded.

At each evaluation, the one before the first step among them, the perplexity on that text is measured and compared with
the first. A small rise is told, a greater one warned of once, and over the bound the run ends and goes back to its best
checkpoint, as any guard makes it. The first perplexity lies in the stage's folder, so that a run that goes on compares
with the same model.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from luthier.data.batches import TokenBatch, cut
from luthier.data.blocks import blocks_of
from luthier.data.encoding import encode
from luthier.data.reading import read_examples
from luthier.data.sequences import TokenSequence, sequences_of
from luthier.errors import DataError, RecipeError, TrainingError
from luthier.pipeline.methods import next_tokens
from luthier.pipeline.sealed import read_sealed, write_sealed
from luthier.recipe.preference import RewardModel
from luthier.recipe.training import Training
from luthier.training.loop import Run, evaluate_loss

__all__ = ["general_text", "watch_forgetting"]

logger = logging.getLogger(__name__)

_BLOCK_TOKENS = 512  # fixed, so that no perplexity depends on the memory there is
_MEND = "lower learning_rate or epochs, or mix general text into the data"


def general_text(settings: Training, tokenizer: PreTrainedTokenizerBase) -> list[TokenSequence]:
    """The first `forgetting_tokens` tokens of `forgetting_data` in blocks; nothing where the settings name none.

    Raises RecipeError for a reward model, which gives no token a probability, and DataError for files without text.
    """
    if settings.forgetting_data is None:
        return []
    if isinstance(settings, RewardModel):
        raise RecipeError("forgetting_data: a reward model has no perplexity; drop it")
    reading = read_examples(settings.forgetting_data, format="text", on_error=settings.on_error)
    documents: list[TokenSequence] = []
    left = settings.forgetting_tokens
    for origin, example in reading.examples:
        (document,) = sequences_of(encode(example, origin, tokenizer, train_on="all"))
        documents.append(TokenSequence(document.token_ids[:left], document.trained[:left], origin))
        left -= len(documents[-1])
        if not left:
            break
    blocks = blocks_of(documents, min(_BLOCK_TOKENS, settings.max_length))
    if not any(block.num_trained for block in blocks):
        raise DataError(f"forgetting_data: {settings.forgetting_data} holds no text; name other files")
    return blocks


def watch_forgetting(run: Run, text: Sequence[TokenSequence], folder: Path) -> None:
    """Lets the run's evaluations measure on the text too, and its guard ask for it, besides what it did before.

    The first perplexity is kept in `folder`. Raises CheckpointError, once the run goes on, where it is not there.
    """
    watch = _Watch(run, text, folder / "forgetting.json")
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
    """path: of the file with the first perplexity."""

    run: Run
    text: Sequence[TokenSequence]
    path: Path
    warned: bool = field(default=False, init=False)

    def measured(self) -> dict[str, float]:
        """The perplexity, and its rise as a share of the first. Raises TrainingError where the first is no number."""
        loss = self.run.room.fitting(self._loss, lambda: (batch.num_tokens for batch in self._batches()))
        perplexity = math.exp(min(loss, 700.0))
        if self.run.state.progress.step == 0:
            if not math.isfinite(loss):
                raise TrainingError(f"forgetting_data: the untrained model's loss on it is {loss}; set dtype: fp32")
            write_sealed(self.path, {"perplexity": perplexity})
        return {"forgetting_perplexity": perplexity, "forgetting": perplexity / self._first() - 1}

    def _batches(self) -> list[TokenBatch]:
        return cut(self.text, self.run.room.tokens)

    def _loss(self) -> float:
        return evaluate_loss(self.run.state.network, self._batches(), next_tokens)

    def _first(self) -> float:
        mend = "nobody knows the perplexity before training; start afresh with resume: false, or drop forgetting_data"
        return float(read_sealed(self.path, mend=mend)["perplexity"])

    def refused(self, measured: dict[str, float]) -> str | None:
        """Why the run has to end; warns once of a rise that is only on the way there."""
        found = measured.get("forgetting")
        if found is None:
            return None
        settings = self.run.settings
        risen = (
            f"the perplexity on forgetting_data has risen to {measured['forgetting_perplexity']:.2f}, by {found:.1%}"
        )
        if not found <= settings.forgetting_stop:  # nan too
            return f"{risen}, over forgetting_stop {settings.forgetting_stop:g} ({_MEND})"
        if found > settings.forgetting_warn and not self.warned:
            self.warned = True
            logger.warning("step %d: %s; %s", self.run.state.progress.step, risen, _MEND)
        return None
