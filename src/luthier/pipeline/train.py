"""One training stage: data, model and settings made into a Run, and what it leaves behind.

Everything that can be refused is refused here before the first step: rows, template, targets, a checkpoint of another
run. The largest micro-batch and the evaluation go first, so that what does not fit into memory fails in the first
minute.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from luthier.adapters.base import Adapter
from luthier.adapters.merge import refuse_unmergeable
from luthier.data.batches import StepPlan, TokenBatch
from luthier.data.prepare import Prepared
from luthier.data.sequences import Item, TokenGroup, sequences_of
from luthier.errors import RecipeError
from luthier.models.float8 import out_of_float8
from luthier.models.load import Model
from luthier.models.weights import weights_hash
from luthier.objectives.loss import Loss
from luthier.pipeline.claim import FREE_SETTINGS
from luthier.pipeline.disk import warn_of_little_room
from luthier.pipeline.forgetting import general_data, watch_forgetting
from luthier.pipeline.live import store_adapter
from luthier.pipeline.manifest import PLAN, kept_plan, rewards_of
from luthier.pipeline.on_policy import on_rollouts, remove_others
from luthier.pipeline.plan import DeviceMemory, Planner, largest_micro_batch
from luthier.pipeline.policy import COLUMNS
from luthier.pipeline.prepare import fresh_state, prepare_data, prepare_network
from luthier.pipeline.prompts import PreparedPrompts, digest_of_prompts
from luthier.pipeline.python_rewards import Functions
from luthier.pipeline.reference import placeholders, referred
from luthier.pipeline.rollout_files import claim_rollouts
from luthier.pipeline.sealed import read_sealed, write_sealed
from luthier.pipeline.stages import STAGES
from luthier.pipeline.watch import watch_answers
from luthier.recipe.preference import WithReference
from luthier.recipe.training import Training
from luthier.shortage import release_freed_memory
from luthier.training.callbacks import Callback, MetricsFile, complete, read_metrics, total_of
from luthier.training.checkpoints import Checkpoints
from luthier.training.deterministic import deterministic
from luthier.training.diagnosis import Diagnosis
from luthier.training.energy import EnergyMeter, gpu_counters, rapl_counters
from luthier.training.float8 import ScalesFile
from luthier.training.loop import fit, step_gradients
from luthier.training.memory import keep_freed_memory, within_free_memory
from luthier.training.offload import activations_on_host, host_copy
from luthier.training.run import Objective, Run
from luthier.training.trackers import tracking

__all__ = ["Summary", "make_run", "read_summary", "train", "write_summary"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Summary:
    """What a stage did. losses: the mean a unit of its objective; first_eval_loss: of the model before its first step.

    folder: the stage's own, with metrics, checkpoints and adapter.  counts: where the rows went, as `Counts` names it.
    spikes: steps left out for a spike in their gradient. left_out_steps: those that the run went back before.
    cut_to_tokens: the bound on a micro-batch once memory had run out; None where it never did. seconds, energy_joules:
    of all its steps and evaluations, also before an interruption; the latter where the machine tells it.
    """

    folder: str
    steps: int
    seconds: float
    milliseconds_per_step: float
    tokens: int
    final_loss: float
    best_eval_loss: float | None
    first_eval_loss: float | None
    final_eval_loss: float | None
    trained_parameters: int
    fingerprint: str
    counts: dict[str, int]
    spikes: int
    left_out_steps: int
    cut_to_tokens: int | None = None
    energy_joules: float | None = None


def write_summary(folder: Path, summary: Summary) -> None:
    """Writes what the stage in this folder did."""
    write_sealed(folder / "summary.json", asdict(summary))


def read_summary(folder: Path) -> Summary:
    """What the stage in this folder did. Raises CheckpointError where the file is damaged."""
    mend = f"delete it and {folder / 'done.json'} and run again, which makes it anew from the last checkpoint"
    return Summary(**read_sealed(folder / "summary.json", mend=mend))


def train(
    word: str,
    settings: Training,
    model: Model,
    folder: Path,
    *,
    callbacks: Sequence[Callback] = (),
    objective: Objective | None = None,
    functions: Functions = MappingProxyType({}),
    to_be_merged: bool = False,
) -> tuple[Prepared, Summary]:
    """Trains a stage in `folder`, going on from its last checkpoint if there is one. The network is left as trained.

    objective: by default the stage's own. functions: that a reward means. to_be_merged: refuses an adapter that cannot
    be, before it is trained.
    """
    if settings.offload_activations and model.device.type == "cpu":
        raise RecipeError("offload_activations: on a CPU they are in the machine's memory already; drop it")
    keep_freed_memory()
    prepared = prepare_data(settings, model, folder)
    for line in (str(prepared.counts), *prepared.audit.lines()):
        logger.info("%s", line)
    tokens = _micro_batch_tokens(word, settings, model, prepared, folder)
    warn_of_little_room(settings, kept_plan(folder / PLAN)["state_bytes"], model.source.folder, folder)
    adapters = prepare_network(settings, model)
    try:
        if to_be_merged:
            refuse_unmergeable(adapters)
        if isinstance(settings, WithReference) and settings.cache_reference:
            prepared = _with_reference(settings, model, prepared, folder, tokens)
        run = make_run(
            *(word, settings, model, prepared, folder),
            callbacks=callbacks,
            adapters=adapters,
            functions=functions,
            micro_batch_tokens=tokens,
        )
        run.objective = objective or run.objective
        if settings.offload_activations:
            run.objective = _kept_on_host(run.objective)
        with deterministic(settings.deterministic), within_free_memory(model.device):
            _resume_or_rehearse(run, prepared)
            fit(run)
        run.state.precision.close()
    finally:
        remove_others(model.network)
        out_of_float8(model.network)
    release_freed_memory()
    if settings.adapter is not None:
        store_adapter(model, folder / "adapter")
    return prepared, _summary(run, prepared, folder)


def _kept_on_host(objective: Objective) -> Objective:
    """The objective, with what its backward pass needs in the machine's memory meanwhile."""

    def offloaded(network: nn.Module, batch: TokenBatch) -> Loss:
        with activations_on_host(network, host_copy):
            return objective(network, batch)

    return offloaded


def make_run(
    word: str,
    settings: Training,
    model: Model,
    prepared: Prepared,
    folder: Path,
    *,
    callbacks: Sequence[Callback] = (),
    adapters: Sequence[Adapter] = (),
    functions: Functions = MappingProxyType({}),
    micro_batch_tokens: int,
) -> Run:
    """The Run of a prepared stage: plan, optimizer, checkpoints and who listens."""
    metrics, falls = folder / "metrics.jsonl", not isinstance(prepared, PreparedPrompts)
    heard: list[Callback] = [MetricsFile(metrics), Diagnosis(metrics, falls=falls), *tracking(settings, folder)]
    if settings.fp8 is not None:
        heard.append(ScalesFile(folder / "fp8.jsonl", model.network))
    method = STAGES[word].method(settings)
    general = general_data(settings, model.tokenizer)
    fingerprint = _fingerprint(settings, model, prepared, general.items)
    checkpoints = Checkpoints(folder / "checkpoints", keep_last=settings.keep_last, fingerprint=fingerprint)
    run = Run(
        state=fresh_state(settings, model),
        plan=StepPlan(prepared.train, settings.batch_size, settings.epochs, settings.seed, settings.max_steps),
        objective=method.objective,
        prepare=method.prepare,
        measure=method.measure,
        guard=method.guard,
        settings=settings,
        micro_batch_tokens=micro_batch_tokens,
        checkpoints=checkpoints,
        eval_items=prepared.evaluation,
        callbacks=[*heard, *callbacks],
        adapters=adapters,
        energy=EnergyMeter([*rapl_counters(), *gpu_counters(model.device)]),
    )
    if isinstance(prepared, PreparedPrompts):
        on_rollouts(run, prepared, model, folder, functions=functions)
    if general.items:
        watch_forgetting(run, general, folder)
    watch_answers(run, prepared, model, folder)
    return run


def _fingerprint(settings: Training, model: Model, prepared: Prepared, general: Sequence[Item]) -> str:
    """What must be equal for a checkpoint to be of this run: all that decides its numbers."""
    elsewhere = dict.fromkeys((*FREE_SETTINGS, "model", "data", "eval_data"), True)  # free, or hashed below
    named = settings.model_dump_json(exclude={**elsewhere, "forgetting": {"text", "questions"}})
    digest = hashlib.sha256(named.encode())
    digest.update(weights_hash(model.source.folder).encode())
    if isinstance(prepared, PreparedPrompts):
        digest.update(f"{digest_of_prompts(prepared)} {list(rewards_of(settings).values())}".encode())
    for part in (prepared.train, prepared.evaluation, general):
        digest.update(f"{len(part)} sequences".encode())
        for item in part:
            if isinstance(item, TokenGroup):
                digest.update(f"{len(item.sequences)} answers {item.scores} {item.desirable}".encode())
            for sequence in sequences_of([item]):
                digest.update(f"{len(sequence.token_ids)} tokens".encode())
                digest.update(sequence.token_ids.tobytes())
                digest.update(sequence.trained.tobytes())
    return digest.hexdigest()


def _with_reference(settings: Training, model: Model, prepared: Prepared, folder: Path, tokens: int) -> Prepared:
    """The data with what the reference model says of all that will be seen."""
    assert isinstance(settings, WithReference)
    plan = StepPlan(prepared.train, settings.batch_size, settings.epochs, settings.seed, settings.max_steps)
    seen = {id(item) for step in range(plan.num_steps) for item in plan.step(step)}
    wanted = [item for item in prepared.train if id(item) in seen]
    found = referred([*wanted, *prepared.evaluation], model, folder, name=settings.reference, micro_batch_tokens=tokens)
    by_item = dict(zip(map(id, wanted), found, strict=False))
    train = [by_item.get(id(item), item) for item in prepared.train]
    return replace(prepared, train=train, evaluation=found[len(wanted) :])


def _micro_batch_tokens(word: str, settings: Training, model: Model, prepared: Prepared, folder: Path) -> int:
    """What the memory plan allows, written to plan.json. A run that goes on keeps what it began with: other cuts round
    otherwise. Raises RecipeError where the smallest micro-batches do not fit.
    """
    path = folder / PLAN
    if settings.resume and path.exists():
        return int(kept_plan(path)["micro_batch_tokens"])
    planner = Planner(word, str(model.source.folder), prepared, DeviceMemory.here(model.device, model.network))
    planned = planner.plan(settings)
    if not planned.fits:
        raise RecipeError(planned.sentence(planner.cheapest_change(settings)))
    folder.mkdir(parents=True, exist_ok=True)
    write_sealed(path, planned.as_dict())
    return planned.micro_batch_tokens


def _resume_or_rehearse(run: Run, prepared: Prepared) -> None:
    assert run.checkpoints is not None
    if not run.settings.resume:
        run.checkpoints.clear()
    found = run.checkpoints.latest()
    if isinstance(prepared, PreparedPrompts):
        claim_rollouts(run.checkpoints.folder.parent, run.checkpoints.fingerprint, anew=not run.settings.resume)
    if found is not None:
        run.checkpoints.load(found, run.state)
        logger.info("going on from %s", found)
        return
    run.state.hold_all()
    run.room.fitting(lambda: _rehearse(run, _largest(run, prepared)), lambda: [_largest(run, prepared).num_tokens])
    run.state.drop_gradients()


def _largest(run: Run, prepared: Prepared) -> TokenBatch:
    """The largest micro-batch of the run, as micro-batches now are."""
    assert run.room.tokens is not None
    largest = largest_micro_batch(run.settings, prepared, run.room.tokens)
    return placeholders(largest, *COLUMNS) if isinstance(prepared, PreparedPrompts) else largest


def _rehearse(run: Run, batch: TokenBatch) -> None:
    """A step's forward and backward pass with all that a step in the midst of the run holds, and without effect."""
    torch.manual_seed(0)
    step_gradients(run.state.network, run.prepared([batch]), run.objective)


def _final_eval_loss(run: Run, evaluations: Sequence[float]) -> float | None:
    """Of the model as it is: the best one's where a guard has gone back to it."""
    if not evaluations:
        return None
    return run.state.progress.best_loss if run.state.progress.stopped_by else evaluations[-1]


def _summary(run: Run, prepared: Prepared, folder: Path) -> Summary:
    lines = read_metrics(folder / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    evaluations = [line["eval_loss"] for line in lines if "eval_loss" in line]
    with complete(folder / "metrics.jsonl"):
        times = [line["seconds"] for line in lines if "loss" in line]
        final_loss = losses[-1]
    assert run.checkpoints is not None
    summary = Summary(
        folder=str(folder),
        steps=run.state.progress.step,
        seconds=total_of(lines, "seconds") or 0.0,
        milliseconds_per_step=1000 * sum(times) / max(1, len(times)),
        tokens=run.state.progress.tokens,
        final_loss=final_loss,
        best_eval_loss=run.state.progress.best_loss,
        first_eval_loss=evaluations[0] if evaluations else None,
        final_eval_loss=_final_eval_loss(run, evaluations),
        trained_parameters=sum(p.numel() for p in run.state.trained().values()),
        fingerprint=run.checkpoints.fingerprint,
        counts=asdict(prepared.counts),
        spikes=run.state.progress.spikes,
        left_out_steps=len(run.state.progress.left_out),
        cut_to_tokens=run.state.progress.micro_batch_tokens,
        energy_joules=total_of(lines, "energy_joules"),
    )
    write_summary(folder, summary)
    return summary
