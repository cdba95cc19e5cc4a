"""A recipe's stages in a row, each on the merged model of the one before, going on where an earlier run stopped.

A stage that is done says so in its `done.json`, with the hashes of its data and of what it has left; it is not done
again, and refused where its data has changed or what it left is damaged. Between two stages the adapter is merged into
the weights as they are stored (not as they were rounded for training), so no adapter ever stands on another.
"""

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from luthier.adapters.merge import can_be_merged
from luthier.adapters.peft_files import WEIGHTS
from luthier.errors import CheckpointError
from luthier.files import file_hash, written_whole
from luthier.models.load import Model, load, load_either
from luthier.models.merge import merge_into
from luthier.models.sources import resolve
from luthier.models.weights import weights_hash
from luthier.pipeline.claim import begins_anew, claim, claimed_by, goes_on, has_trained
from luthier.pipeline.done import DONE, is_done, note_done, refuse_changed, refuse_damaged
from luthier.pipeline.live import store_trained
from luthier.pipeline.manifest import data_hashes, write_manifest
from luthier.pipeline.report import write_report
from luthier.pipeline.rounds import forget_rounds, run_rounds
from luthier.pipeline.train import Summary, read_summary, train, write_summary
from luthier.recipe.document import Recipe, Stage, dump_recipe
from luthier.recipe.preference import RewardModel
from luthier.recipe.rounds import IterativeDPO
from luthier.training.callbacks import Callback
from luthier.training.trackers import tracking

__all__ = ["Listeners", "run_recipe", "run_stage"]

logger = logging.getLogger(__name__)

Listeners = Callable[[int, Stage], Sequence[Callback]]


def run_recipe(recipe: Recipe, *, listeners: Listeners = lambda index, stage: ()) -> list[Summary]:
    """Runs every stage that is not done yet and leaves the final model in `output`/model.

    listeners: asked at the start of each stage for the callbacks that shall hear of it. From the first stage with
    `resume: false` on, an earlier run is begun anew. Raises CheckpointError where the output folder holds another
    recipe's run.
    """
    output = Path(recipe.output)
    for stage in recipe.stages:
        tracking(stage.settings, output)  # refuses one that is not installed, before the first stage and not the last
    _claim(output, recipe)
    summaries: list[Summary] = []
    source, before = recipe.model, None
    for index, stage in enumerate(recipe.stages):
        folder = output / f"{index:02d}-{stage.word}"
        last = index == len(recipe.stages) - 1
        destination = output / "model" if last else folder / "model"
        callbacks = listeners(index, stage)
        if before is not None and not is_done(folder):
            refuse_damaged(before, "model", Path(source))
        summaries.append(run_stage(stage, source, folder, destination, callbacks, last=last))
        before, source = folder, str(destination)
    _describe(output, recipe)
    write_report(output)
    return summaries


def _claim(output: Path, recipe: Recipe) -> None:
    """Makes the folder this recipe's, or makes sure that it is already, and forgets what is to begin anew."""
    text, found = dump_recipe(recipe), claimed_by(output)
    if found is not None and has_trained(output):
        if not goes_on(text, found):
            raise CheckpointError(
                f"{output} holds a run of another recipe; choose another output, or delete that folder"
            )
        _forget(output, recipe)
    claim(output, text)


def _forget(output: Path, recipe: Recipe) -> None:
    """Later stages first, so that a kill leaves no stage done on a model that is to be trained again."""
    folders = [output / f"{index:02d}-{stage.word}" for index, stage in enumerate(recipe.stages)]
    for folder in reversed(folders[begins_anew(recipe.stages) :]):
        for file in (DONE, "plan.json"):
            (folder / file).unlink(missing_ok=True)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        forget_rounds(folder)


def run_stage(
    stage: Stage, source: str, folder: Path, destination: Path, callbacks: Sequence[Callback], *, last: bool
) -> Summary:
    """Trains one stage in `folder`, unless that is done, and leaves its model in `destination`.

    last: no stage follows, so that an adapter which cannot be merged may stay beside the model.
    """
    data = data_hashes(stage.settings)
    if is_done(folder):
        refuse_changed(folder, data)
        if (folder / "adapter").is_dir():
            refuse_damaged(folder, "adapter", folder / "adapter")
        if last:
            refuse_damaged(folder, "model", destination)
        logger.info("%s is done already", folder)
        return read_summary(folder)
    if isinstance(stage.settings, IterativeDPO):
        summary = _run_rounds(stage.settings, source, folder, destination, callbacks)
    else:
        of_reward = isinstance(stage.settings, RewardModel)  # which alone trains a reward model on
        model = (load_either if of_reward else load)(source, dtype=stage.settings.dtype)
        _, summary = train(stage.word, stage.settings, model, folder, callbacks=callbacks, to_be_merged=not last)
        _hand_over(stage, model, folder, destination)
    note_done(folder, data=data, made={"adapter": folder / "adapter", "model": destination})
    return summary


def _run_rounds(
    settings: IterativeDPO, source: str, folder: Path, destination: Path, callbacks: Sequence[Callback]
) -> Summary:
    """Each round as a stage; the best one's model becomes the stage's, and its files stand beside the others'."""

    def train_round(stage: Stage, source: str, place: Path, model: Path) -> Summary:
        was_done = is_done(place)
        summary = run_stage(stage, source, place, model, callbacks, last=False)
        if was_done:
            refuse_damaged(place, "model", model)
        return summary

    summaries, best = run_rounds(settings, source, folder, train_round)
    with written_whole(destination) as beside:
        shutil.copytree(resolve(best).folder, beside, dirs_exist_ok=True)
    summary = replace(
        summaries[-1],
        folder=str(folder),
        steps=sum(one.steps for one in summaries),
        seconds=sum(one.seconds for one in summaries),
        tokens=sum(one.tokens for one in summaries),
        cut_to_tokens=min((one.cut_to_tokens for one in summaries if one.cut_to_tokens), default=None),
        energy_joules=_sum_of_all([one.energy_joules for one in summaries]),
    )
    write_summary(folder, summary)
    return summary


def _sum_of_all(values: Sequence[float | None]) -> float | None:
    """None where one of them is not known."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _hand_over(stage: Stage, model: Model, folder: Path, destination: Path) -> None:
    """Writes the trained model without adapters: what was trained, in or over the weights as they are stored. An
    adapter that cannot be merged stays beside the model.
    """
    if not can_be_merged(model.network):
        logger.info("%s stays beside %s: give both (--model, --adapter)", folder / "adapter", model.source.name)
    elif stage.settings.adapter is None:
        store_trained(model, stage.settings, folder, destination)
    else:
        merge_into(model.source, folder / "adapter", destination, tokenizer=model.tokenizer)


def _describe(output: Path, recipe: Recipe) -> None:
    base = resolve(recipe.model)
    artifacts, shortages = {}, {}
    parent = f"{recipe.model}"
    for index, stage in enumerate(recipe.stages):
        name = f"{index:02d}-{stage.word}"
        adapter = output / name / "adapter" / WEIGHTS
        made = {"sha256": file_hash(adapter)} if adapter.exists() else {}
        artifacts[f"{name}/adapter" if made else name] = {"parent": parent, **made}
        parent = name
        if (tokens := read_summary(output / name).cut_to_tokens) is not None:
            shortages[name] = tokens
    if (output / "model").is_dir():
        artifacts["model"] = {"parent": parent, "sha256": weights_hash(output / "model")}
    write_manifest(
        output,
        recipe,
        base={"name": recipe.model, "sha256": weights_hash(base.folder)},
        artifacts=artifacts,
        shortages=shortages,
    )
