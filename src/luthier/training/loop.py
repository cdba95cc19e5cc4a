"""The one training loop. A method is an objective; a run is a plan of steps; everything else is here, once.

The division by the number of units happens here and nowhere else: by the units of the whole step, over all its
micro-batches, known before the first backward pass. That is why the gradient does not depend on how a step is cut.
No number is read from the device before the optimizer's step is on its way.
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from luthier.adapters.base import Adapter, Step
from luthier.adapters.inject import after_step, before_step, penalty
from luthier.data.batches import TokenBatch, cut, pass_sizes
from luthier.errors import TrainingError
from luthier.models.score import evaluating
from luthier.recipe.precision import DynamicScaling
from luthier.training.callbacks import Metrics
from luthier.training.float8 import begin_step, end_step
from luthier.training.loss_scaling import backward, can_fall, next_scale, unscale
from luthier.training.memory import memory_bytes
from luthier.training.optimizers import step_if_finite
from luthier.training.recovery import MOST_FAILED, go_back_before_failure
from luthier.training.run import Objective, Run
from luthier.training.schedules import learning_rate_at
from luthier.training.spikes import remembered, spike_bound
from luthier.training.stopping import Stopped
from luthier.training.totals import add_up, read

__all__ = ["evaluate_loss", "fit", "step_gradients", "train_step"]

logger = logging.getLogger(__name__)


def fit(run: Run) -> Metrics:
    """Trains from where the state is to the end of the plan. Returns the metrics of the last step.

    Where the gradient is not finite for several steps in a row, or the weights are not, the run goes back to the last
    good checkpoint and leaves these steps out. Raises TrainingError where that cannot be done or does not help, and
    Stopped where `run.stop` was asked.
    """
    _announce(run)
    try:
        with run.stop.held():
            return _all_steps(run)
    finally:
        for callback in run.callbacks:
            callback.on_end()


def _all_steps(run: Run) -> Metrics:
    metrics: Metrics = {}
    _begin(run)
    if run.state.progress.unevaluated:
        _evaluate_and_save(run)
    while run.state.progress.step < run.plan.num_steps and not run.state.progress.early_stopped:
        metrics = _next_step(run) or metrics
        if trouble := _trouble(run):
            _start_again(run, trouble)
        else:
            _evaluate_and_save(run)
    if run.state.progress.stopped_by:
        _go_back(run)
    run.state.eval()
    return metrics


def _announce(run: Run) -> None:
    """Says from where the run goes on."""
    for callback in run.callbacks:
        callback.on_start(run.state.progress.step, run.plan.num_steps)
    if run.energy:
        run.energy.spent()  # what went before is no step's


def _begin(run: Run) -> None:
    """Measures the model before its first step."""
    progress = run.state.progress
    if run.evaluates and progress.step == 0:
        progress.best_loss, progress.stale_evaluations = None, 0  # a run may come back to its start
        best = _evaluate(run)
        if run.guard and run.checkpoints:  # there must be something to go back to
            run.checkpoints.save(run.state, best=best)


def _next_step(run: Run) -> Metrics | None:
    """Takes the step and tells of it; one that the run has gone back for is passed over."""
    progress = run.state.progress
    if progress.step in progress.left_out:
        progress.step += 1
        return None
    metrics = train_step(run)
    if progress.skipped_steps < MOST_FAILED:
        _tell(run, metrics)
        _ask_guard(run, metrics)
    return metrics


def _trouble(run: Run) -> str | None:
    """Why nobody can go on from here, if so. Weights are looked at before they are measured or saved."""
    progress = run.state.progress
    if progress.skipped_steps >= MOST_FAILED:
        return f"the gradient was not finite for {progress.skipped_steps} steps in a row"
    if (_evaluates_now(run) or _saves_now(run)) and not run.state.is_finite():
        return "the weights or the optimizer's moments are not finite"
    return None


def _start_again(run: Run, trouble: str) -> None:
    go_back_before_failure(run.state, run.checkpoints, trouble, num_steps=run.plan.num_steps)
    for callback in run.callbacks:
        callback.on_end()
    _announce(run)
    _begin(run)


@contextmanager
def _weights_rest(run: Run) -> Iterator[None]:
    """For the time of the context no weight changes, so the run may end at once, with a checkpoint. Where it is stopped
    while the weights are in another form for sampling, there is none.
    """
    before = run.state.marks()
    try:
        with run.stop.interruptible():
            yield
    except Stopped:
        if run.checkpoints and run.state.progress.step and run.state.marks() == before:
            run.checkpoints.save_between(run.state)
        raise


def train_step(run: Run) -> Metrics:
    """One optimizer step; counts itself in the state's progress."""
    started, progress, num_steps = time.perf_counter(), run.state.progress, run.plan.num_steps
    run.state.train()
    step = Step(progress.step, num_steps, run.settings.seed)
    before_step(run.adapters, step)
    scale = progress.loss_scale_by(run.settings.loss_scaling).scale
    measured, num_tokens = _in_room(run, scale)
    measured |= _add_penalty(run.adapters, scale)
    rate = learning_rate_at(progress.step, num_steps, run.settings)
    unscale(run.state.trained().values(), scale)
    measured |= _optimize(run, rate)
    measured |= end_step(run.state.network)
    numbers = read(measured)
    _count_or_skip(run, numbers["grad_norm"], step, left_out=bool(numbers["skipped"]))
    if run.settings.max_grad_spike is None:
        del numbers["skipped"]  # a gradient that is not finite says so itself
    run.state.optimizer.zero_grad(set_to_none=True)  # not before: adapters may look at gradients after a step
    progress.step += 1
    progress.tokens += num_tokens
    seconds = time.perf_counter() - started
    return {
        "step": progress.step,
        "epoch": round(run.plan.epoch_at(progress.step), 6),
        **numbers,
        **run.plan.told(progress.step - 1),
        "learning_rate": rate,
        **({"loss_scale": scale} if run.settings.loss_scaling else {}),
        "tokens": progress.tokens,
        "seconds": seconds,
        "tokens_per_second": num_tokens / seconds,
        "memory_bytes": memory_bytes(run.state.network),
    }


def _in_room(run: Run, scale: float) -> tuple[dict[str, Tensor], int]:
    """The gradient of the step to come, in micro-batches that fit; what was measured, and how many tokens there are."""
    index = run.state.progress.step

    def work() -> tuple[dict[str, Tensor], int]:
        run.state.drop_gradients()
        begin_step(run.state.network)
        with _weights_rest(run):
            micro_batches = run.cut(index)
        torch.manual_seed(_mixed(run.settings.seed, index))  # dropout's draws belong to the step
        measured = _add_gradients(run.state.network, run.prepared(micro_batches), run.objective, scale)
        return measured, sum(batch.num_tokens for batch in micro_batches)

    return run.room.fitting(work, lambda: (batch.num_tokens for batch in run.cut(index)))


def step_gradients(network: nn.Module, micro_batches: Sequence[TokenBatch], objective: Objective) -> dict[str, float]:
    """Adds the gradient of a step's mean loss to the parameters; returns the loss and the metrics, as means over
    units.
    """
    return read(_add_gradients(network, micro_batches, objective, scale=1.0))


def _add_gradients(
    network: nn.Module, micro_batches: Sequence[TokenBatch], objective: Objective, scale: float
) -> dict[str, Tensor]:
    """`step_gradients` with its numbers still on the device, and the gradient that of scale * loss."""
    totals = {"loss": torch.zeros((), device=next(network.parameters()).device)}  # of a step that teaches nothing
    for batch in micro_batches:
        if not batch.count("tokens"):
            continue
        loss = objective(network, batch)
        num_units = sum(other.count(loss.unit) for other in micro_batches)
        mean = loss.per_unit.sum() / num_units
        backward(mean, scale)
        add_up(totals, {"loss": mean.detach(), **loss.kept})
        del loss, mean  # with their graph, before the next one grows
    return totals


def _add_penalty(adapters: Sequence[Adapter], scale: float) -> dict[str, Tensor]:
    """Adds the gradient of scale * what the adapters add to the loss, once a step and undivided."""
    added = penalty(adapters)
    if added is None:
        return {}
    backward(added, scale)
    return {"penalty": added.detach()}


def _optimize(run: Run, rate: float) -> dict[str, Tensor]:
    """Clips and steps, unless the gradient is not finite or a spike. Returns its norm before clipping, and whether the
    step was left out.
    """
    state, settings = run.state, run.settings
    parameters = [p for p in state.trained().values() if p.grad is not None]
    most = math.inf if settings.max_grad_norm is None else settings.max_grad_norm
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, most)
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group["rate_ratio"]
    factor = settings.max_grad_spike
    bound = math.inf if factor is None else spike_bound(state.progress.norms, factor)
    left_out = step_if_finite(state.optimizer, grad_norm, at_most=bound)
    state.precision.write_back()
    return {"grad_norm": grad_norm, "skipped": left_out}


def _count_or_skip(run: Run, grad_norm: float, step: Step, *, left_out: bool) -> None:
    """What follows a step that was taken, or one that the optimizer left out."""
    progress, finite = run.state.progress, math.isfinite(grad_norm)
    overflows = _adjust_scale(run, finite=finite)
    if run.settings.max_grad_spike is not None:
        progress.norms = remembered(progress.norms, grad_norm)
    if finite:
        progress.skipped_steps = 0
        progress.spikes += left_out
    elif not overflows:
        progress.skipped_steps += 1
    if not left_out:
        after_step(run.adapters, step)
    elif not overflows:
        what = f"norm is {grad_norm:.3g}, a spike" if finite else f"is {grad_norm}"
        logger.warning("step %d: the gradient %s; the step is left out", progress.step + 1, what)


def _adjust_scale(run: Run, *, finite: bool) -> bool:
    """The next step's scale of the loss; returns whether this step overflowed by a scale that is lower now."""
    progress, settings = run.state.progress, run.settings.loss_scaling
    now = progress.loss_scale_by(settings)
    after = next_scale(now, settings, finite=finite)
    progress.loss_scale, progress.good_steps = after.scale, after.good_steps
    if finite or not isinstance(settings, DynamicScaling):
        return False
    if not can_fall(now, settings):
        raise TrainingError(
            f"step {progress.step + 1}: the gradient overflows fp16 with loss_scaling at its floor, {now.scale:g}; "
            "lower learning_rate, or set dtype: bf16 or fp32; the last good checkpoint is kept"
        )
    logger.info("step %d overflows fp16 and is left out; the loss scale is %g now", progress.step + 1, after.scale)
    return True


def evaluate_loss(network: nn.Module, batches: Sequence[TokenBatch], objective: Objective) -> float:
    """The mean loss a unit over all batches, without dropout. Raises TrainingError where nothing is trained in them."""
    with evaluating(network):
        return _evaluated(network, batches, objective)["loss"]


def _evaluated(network: nn.Module, batches: Sequence[TokenBatch], objective: Objective) -> dict[str, float]:
    """The mean loss a unit, the perplexity where the unit is the token, and the metrics, over all batches."""
    if not any(batch.count("tokens") for batch in batches):
        raise TrainingError("no sequence to evaluate on has a trained token; look at it with `luthier data preview`")
    losses = [objective(network, batch) for batch in batches if batch.count("tokens")]
    num_units = sum(len(loss.per_unit) for loss in losses)
    totals: dict[str, Tensor] = {}
    for loss in losses:
        add_up(totals, loss.kept)
    mean = float(sum(loss.per_unit.double().sum() for loss in losses)) / num_units
    perplexity = {"perplexity": math.exp(min(mean, 700.0))} if losses[0].unit == "tokens" else {}
    return {"loss": mean, **perplexity, **read(totals)}


def _evaluate_and_save(run: Run) -> None:
    progress = run.state.progress
    progress.unevaluated = _evaluates_now(run)
    best = progress.unevaluated and _evaluate(run)
    if run.checkpoints and (best or _saves_now(run)):
        run.checkpoints.save(run.state, best=best)


def _evaluates_now(run: Run) -> bool:
    return run.evaluates and (_ends(run) or _due(run, run.settings.eval_every))


def _saves_now(run: Run) -> bool:
    return _ends(run) or _due(run, run.settings.save_every)


def _ends(run: Run) -> bool:
    return run.state.progress.step == run.plan.num_steps or run.state.progress.early_stopped


def _go_back(run: Run) -> None:
    """The best weights so far, after a guard has ended the training; that it ended stays in its progress."""
    progress, best = run.state.progress, run.checkpoints.best() if run.checkpoints else None
    if run.checkpoints and best:
        run.checkpoints.load(best, run.state)
        logger.warning("going back to the best checkpoint, %s", best.name)
    run.state.progress = progress


def _evaluate(run: Run) -> bool:
    """Measures the evaluation loss; returns whether it is the best so far, which one that is not finite never is, nor
    one that a guard refuses.
    """
    started, progress = time.perf_counter(), run.state.progress
    run.state.eval()
    with _weights_rest(run), evaluating(run.state.network):
        measured = _evaluated_run(run)
    loss, progress.unevaluated = measured["loss"], False
    _ask_guard(run, measured)
    best = math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss) and not progress.stopped_by
    progress.best_loss = loss if best else progress.best_loss
    progress.stale_evaluations = 0 if best else progress.stale_evaluations + 1
    patience = run.settings.early_stopping
    stale = patience is not None and progress.stale_evaluations >= patience
    progress.early_stopped = stale or progress.stopped_by is not None
    seconds = time.perf_counter() - started
    told = {f"eval_{name}": value for name, value in measured.items()}
    _tell(run, {"step": progress.step, **told, "seconds": seconds})
    return best


def _evaluated_run(run: Run) -> dict[str, float]:
    if run.evaluation is not None:
        return run.evaluation()

    def work() -> dict[str, float]:
        batches = run.prepared(cut(run.eval_items, run.room.tokens))
        measured = _evaluated(run.state.network, batches, run.objective)
        return measured if run.measure is None else measured | run.measure(run.state.network, batches)

    return run.room.fitting(work, lambda: pass_sizes(run.eval_items, run.room.tokens))


def _ask_guard(run: Run, measured: dict[str, float]) -> None:
    """Ends the training where the guard says why; a reason once given stays."""
    progress = run.state.progress
    if run.guard is None or progress.stopped_by or not (reason := run.guard(measured)):
        return
    progress.stopped_by, progress.early_stopped = reason, True
    logger.warning("step %d: %s; the training ends", progress.step, reason)


def _due(run: Run, interval: int | str | None) -> bool:
    if interval is None:
        return False
    every = run.plan.steps_per_epoch if interval == "epoch" else int(interval)
    return run.state.progress.step % every == 0


def _tell(run: Run, metrics: Metrics) -> None:
    told = metrics | (run.energy.spent() if run.energy else {})
    for callback in run.callbacks:
        callback.on_metrics(told)


def _mixed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step) % 2**63
