"""The stages as Python functions: a model in memory goes through them as a recipe's model does, to the same bits.

A call is a recipe with this one stage: the same settings, the same files below `output`, and the same call in a new
process goes on where it was stopped. What differs is where the model is: in memory, with the new adapter on it, and
written by `save` alone. Before the next stage that adapter is merged (`live.py`). Weights that were changed by other
hands are not noticed: save such a model and load it again.
"""

import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier.data.batches import StepPlan, TokenBatch, cut
from luthier.data.prepare import prepare
from luthier.errors import CheckpointError, RecipeError, TrainingError
from luthier.models.load import Model
from luthier.models.save import save as save_plain
from luthier.models.sources import resolve
from luthier.objectives.loss import Loss, Unit
from luthier.pipeline.claim import claim, claimed_by, digest_of_code, give_back, goes_on
from luthier.pipeline.live import (
    carries_adapter,
    merge_carried,
    set_aside,
    settle,
    start_digest,
    undo,
    write_merged,
)
from luthier.pipeline.python_calls import MODELS_OWN, explained, settings_for, with_paths_as_text
from luthier.pipeline.python_rewards import Functions, described
from luthier.pipeline.run import run_stage
from luthier.pipeline.stages import STAGES
from luthier.pipeline.train import Summary, train
from luthier.recipe.document import Stage, dump_recipe, recipe_of
from luthier.recipe.policy import OnPolicy
from luthier.recipe.problems import unknown
from luthier.recipe.rounds import IterativeDPO
from luthier.recipe.settings import settings_from
from luthier.recipe.stages import STAGE_SETTINGS
from luthier.recipe.training import SFT, DType, Training
from luthier.training.callbacks import Callback, Metrics
from luthier.training.run import Objective

__all__ = ["FUNCTIONS", "Batches", "batches", "fit", "save"]

logger = logging.getLogger(__name__)

_OF_DATA = {
    *("data", "eval_data", "eval_fraction", "format", "columns", "on_error", "max_length", "on_long", "train_on"),
    *("mix", "seed", "epochs", "max_steps", "batch_size", "packing", "micro_batch_tokens"),
}

_STAGE_DOC = """{summary}

model: as `load` gives it. An adapter that it carries is merged first; afterwards it carries the one trained here.
callbacks: told of each step and evaluation; besides, progress goes to the log.
Returns what the stage did. The same call in a new process goes on where this one was stopped, or takes up its result.
Without `output`, a folder that holds another run is left alone, and this one goes to {output}-2, -3 and so on.
Raises RecipeError for a setting that is wrong, DataError for data that would spoil the run, CheckpointError if `output`
holds another run, TrainingError where training breaks down. After any failure, and after Ctrl-C, the model is what it
was before, with the adapter that it carried merged.
"""


@dataclass(frozen=True, slots=True)
class Batches:
    """Data described and not yet read: files, how their rows become sequences, and how these are cut into steps.

    Iterating reads it and gives the batches of one pass, in training's order; each time anew.
    """

    word: str
    tokenizer: PreTrainedTokenizerBase
    given: Mapping[str, object]

    @property
    def settings(self) -> Training:
        """What was given, and defaults for the rest."""
        return settings_from(STAGE_SETTINGS[self.word], self.given)

    def __iter__(self) -> Iterator[TokenBatch]:
        settings = self.settings
        sequences = prepare(settings, self.tokenizer).train
        plan = StepPlan(sequences, settings.batch_size, 1, settings.seed, settings.max_steps)
        for step in range(plan.num_steps):
            yield from cut(plan.step(step), settings.micro_batch_tokens, packing=settings.packing)


@dataclass(frozen=True, slots=True)
class _Call:
    """What is to be done with a model. objective: None for the stage's own. functions: that its reward means. named:
    the user chose the output.
    """

    word: str
    settings: Training
    tokenizer: PreTrainedTokenizerBase
    callbacks: Sequence[Callback]
    objective: Objective | None = None
    functions: Functions = field(default_factory=dict)
    named: bool = False

    def at(self, output: str, start: str | None) -> "_Call":
        """The same in this folder; on the model that is merged there, if `start` says which."""
        model_name = self.settings.model if start is None else str(Path(output) / f"start-{start}")
        return replace(self, settings=self.settings.model_copy(update={"output": output, "model": model_name}))

    @property
    def text(self) -> str:
        """What the folder of the run says. Whether it is to go on or to begin anew is not part of what it is."""
        recipe = recipe_of(self.word, self.settings.model_copy(update={"resume": True}))
        note = "" if self.objective is None else f"# objective: {digest_of_code(self.objective)}\n"
        return note + dump_recipe(recipe)


def batches(
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    stage: str = "sft",
    **given: object,
) -> Batches:
    """Describes data for `fit`; nothing is read yet.

    stage: whose data it is, which decides how rows become sequences: sft for conversations, pretrain for plain text in
    blocks, which `mix` may mix with other text.
    Raises RecipeError for a setting that is wrong, or that is not about data.
    """
    if stage not in STAGE_SETTINGS:
        raise RecipeError(f"stage: {unknown('stage', stage, list(STAGE_SETTINGS))}")
    for name in given:
        if name in STAGE_SETTINGS[stage].model_fields and name not in _OF_DATA:
            raise RecipeError(f"{name}: is not about data; give it to fit")
    described = Batches(stage, tokenizer, with_paths_as_text({"data": data, **given}))
    settings_from(STAGE_SETTINGS[stage], described.given)
    return described


def fit(
    model: Model,
    batches: Batches,
    *,
    objective: Objective,
    output: str | os.PathLike[str] | None = None,
    callbacks: Sequence[Callback] = (),
    **given: object,
) -> Summary:
    """Trains with an objective of one's own; all else is as in the stages' functions.

    objective: called with the network being trained and a TokenBatch on its device; returns a Loss with one loss a
    unit, unreduced, for the loop alone divides. Where its code was edited it is another run.
    output: the folder of the run, by default runs/fit, or runs/fit-2 and so on where that holds another run.
    Raises what the stages' functions raise, and TrainingError for losses that are not one a unit.
    """
    for name in given:
        if name in _OF_DATA:
            raise RecipeError(f"{name}: is about data; give it to batches")
    values = {**batches.given, **given, "output": output or "runs/fit"}
    settings = settings_for(model, STAGE_SETTINGS[batches.word], values)
    call = _Call(batches.word, settings, batches.tokenizer, callbacks, objective, named=output is not None)
    return _run(model, call)


def save(model: Model, folder: str | os.PathLike[str], *, dtype: DType | None = None) -> Path:
    """Writes the model as one without adapter, so that loading it gives what is in memory. Returns the folder.

    An adapter is merged into the weights as they are stored, and stays on the model in memory.
    dtype: of the weights in the file, by default their own.
    Raises ModelError if the folder cannot be written or holds other files, AdapterError if the adapter cannot be
    merged.
    """
    if carries_adapter(model):
        return write_merged(model, Path(folder), dtype=dtype)
    return save_plain(model, Path(folder), dtype=dtype)


def _function(word: str) -> Callable[..., Summary]:
    """The function of a stage's word."""
    kind = STAGE_SETTINGS[word]

    def stage(model: Model, *, callbacks: Sequence[Callback] = (), **given: object) -> Summary:
        functions: Functions = {}
        if issubclass(kind, OnPolicy) and "reward" in given:
            given["reward"], functions = described(given["reward"])
        settings = settings_for(model, kind, given)
        call = _Call(word, settings, model.tokenizer, callbacks, functions=functions, named="output" in given)
        return _run(model, call)

    stage.__name__ = stage.__qualname__ = word
    stage.__doc__ = _STAGE_DOC.format(summary=STAGES[word].summary, output=kind.model_fields["output"].default)
    return explained(stage, kind, kind.model_fields.keys() - MODELS_OWN)


def _run(model: Model, call: _Call) -> Summary:
    """Trains in the folder that is this run's, on the model as it is with its adapter merged."""
    start = start_digest(model) if carries_adapter(model) else None
    call, is_new = _claimed(call, start)
    output = Path(call.settings.output)
    try:
        if start is not None:
            merge_carried(model, Path(call.settings.model))
        return _train(model, call, output)
    except BaseException:
        if is_new:
            give_back(output)
        raise


def _claimed(call: _Call, start: str | None) -> tuple[_Call, bool]:
    """The call in its folder, and whether the folder was not its own before."""
    wanted = call.settings.output
    numbered = (f"{wanted}-{number}" for number in itertools.count(2))
    for output in [wanted] if call.named else itertools.chain([wanted], numbered):
        placed = call.at(output, start)
        found = claimed_by(Path(output))
        if found is None:
            claim(Path(output), placed.text)
        if found is None or goes_on(placed.text, found):
            logger.info("%s: in %s", call.word, output)
            return placed, found is None
    raise CheckpointError(f"{wanted} holds another run; choose another output, or delete that folder")


def _train(model: Model, call: _Call, output: Path) -> Summary:
    folder = output / f"00-{call.word}"
    objective = None if call.objective is None else _counted(call.objective)
    listeners = [_Log(call.word), *call.callbacks]
    if isinstance(call.settings, IterativeDPO):
        return _train_in_rounds(model, call.settings, call.word, output, listeners)
    trained = replace(model, tokenizer=call.tokenizer)
    try:
        _, summary = train(
            call.word,
            call.settings,
            trained,
            folder,
            callbacks=listeners,
            objective=objective,
            functions=call.functions,
        )
        settle(trained, call.settings, folder, output / "model")
        model.network, model.source = trained.network, trained.source
        if trained.tokenizer is not call.tokenizer:  # it got new tokens
            model.tokenizer = trained.tokenizer
    except BaseException:
        undo(model, call.settings)
        raise
    return summary


def _train_in_rounds(
    model: Model, settings: IterativeDPO, word: str, output: Path, listeners: Sequence[Callback]
) -> Summary:
    """Rounds load and write models themselves, so the one in memory makes room for them and becomes what they leave."""
    source, place = model.source, output / "model"
    with set_aside(model):
        summary = run_stage(
            Stage(word, settings), str(source.folder), output / f"00-{word}", place, listeners, last=True
        )
        model.source = resolve(str(place), source.environment)
    return summary


def _counted(objective: Objective) -> Objective:
    """The objective, held to its promise: a mean would be divided once more, by units that it is not of."""

    def counted(network: nn.Module, batch: TokenBatch) -> Loss:
        assert isinstance(network, PreTrainedModel)
        batch = batch.to(network.device)
        loss = objective(network, batch)
        if not isinstance(loss, Loss):
            raise TrainingError(f"the objective returned {type(loss).__name__}; return Loss(losses, unit=...)")
        if loss.unit not in get_args(Unit):
            raise TrainingError(f'the objective\'s unit is "{loss.unit}"; choose one of {", ".join(get_args(Unit))}')
        if loss.per_unit.shape != (batch.count(loss.unit),):
            raise TrainingError(
                f"the objective returned losses of shape {list(loss.per_unit.shape)} for {batch.count(loss.unit)} "
                f"{loss.unit}; return one loss a unit and no mean or sum, the loop divides"
            )
        return loss

    return counted


class _Log:
    """Progress as log lines: a tenth of the steps, and every evaluation."""

    def __init__(self, word: str) -> None:
        self.word = word

    def on_start(self, step: int, num_steps: int) -> None:
        self.num_steps = num_steps
        logger.info("%s: from step %d to %d", self.word, step, num_steps)

    def on_metrics(self, metrics: Metrics) -> None:
        if "eval_loss" in metrics:
            logger.info("%s step %d: held-out loss %.4f", self.word, metrics["step"], metrics["eval_loss"])
        elif metrics["step"] % max(1, self.num_steps // 10) == 0:
            logger.info("%s step %d/%d: loss %.4f", self.word, metrics["step"], self.num_steps, metrics["loss"])

    def on_end(self) -> None: ...


FUNCTIONS: dict[str, Callable[..., Summary]] = {word: _function(word) for word in STAGES}
explained(batches, SFT, _OF_DATA)
explained(fit, SFT, SFT.model_fields.keys() - _OF_DATA - MODELS_OWN)
