"""The gradient of a step does not depend on how it is cut; what is not finite is left out; evaluations decide."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from luthier.adapters.base import Adapter, Step
from luthier.adapters.lora import LoRA
from luthier.data.batches import TokenBatch, collate, cut
from luthier.data.sequences import TokenSequence
from luthier.errors import TrainingError
from luthier.models.recompute import checkpoint_layers
from luthier.models.score import score
from luthier.objectives.loss import Loss
from luthier.recipe.adapters import LoRA as Settings
from luthier.training.callbacks import Metrics
from luthier.training.loop import evaluate_loss, fit, step_gradients, train_step
from luthier.training.run import Run

RowsOf = Callable[..., list[TokenSequence]]
RunOf = Callable[..., Run]
Broken = Callable[[Run, Sequence[int]], None]


class Recorder:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[Metrics] = []
        self.events: list[str] = []

    def on_start(self, step: int, num_steps: int) -> None:
        self.events.append(f"start {step} of {num_steps}")

    def on_metrics(self, metrics: Metrics) -> None:
        self.told.append(metrics)
        self.events.append(f"{'evaluation' if 'eval_loss' in metrics else 'step'} {metrics['step']}")

    def on_end(self) -> None:
        self.events.append("end")


def cuts(rows: list[TokenSequence]) -> dict[str, list[TokenBatch]]:
    """Eight sequences as micro-batches: 1x8, 2x4, 8x1, unequal, packed by tokens, and without packing."""
    return {
        "1x8": [collate(rows)],
        "2x4": [collate(rows[:4]), collate(rows[4:])],
        "8x1": [collate([row]) for row in rows],
        "1+6+1": [collate(rows[:1]), collate(rows[1:7]), collate(rows[7:])],
        "packed": cut(rows, 32),
        "unpacked": cut(rows, 32, packing=False),
    }


def per_sequence(network: nn.Module, batch: TokenBatch) -> Loss:
    """A loss a sequence: the sum of its targets'."""
    logprobs = score(network, batch).logprobs
    sums = torch.zeros(len(batch.segments.lengths)).index_add(0, batch.target_sequence, logprobs)
    return Loss(-sums, unit="sequences")


@pytest.mark.parametrize("unit", ["tokens", "sequences"])
@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
def test_the_gradient_does_not_depend_on_how_a_step_is_cut(
    run_of: RunOf, rows_of: RowsOf, unit: str, adapter: bool
) -> None:
    """To 1e-6 of the largest entry: float32 sums of other order. Means of means would be off by tens of percent."""
    run = run_of()
    network = run.state.network.requires_grad_(True) if not adapter else run.state.network
    objective = run.objective if unit == "tokens" else per_sequence
    found: dict[str, tuple[float, dict[str, Tensor]]] = {}
    for name, micro_batches in cuts(rows_of(8)).items():
        network.zero_grad()
        loss = step_gradients(network, micro_batches, objective)["loss"]
        found[name] = loss, {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    expected_loss, expected = found.pop("1x8")
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, (loss, gradients) in found.items():
        assert loss == pytest.approx(expected_loss, rel=1e-6), name
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[key], rtol=0, atol=1e-6 * largest, msg=f"{name}: {key}")


def test_the_loss_of_a_step_is_the_mean_over_its_trained_tokens(run_of: RunOf, rows_of: RowsOf) -> None:
    run, rows = run_of(), rows_of(8)
    scores = [score(run.state.network, collate([row])) for row in rows]
    logprobs = torch.cat([s.logprobs.detach() for s in scores])
    entropy = torch.cat([s.entropy for s in scores])
    assert len(logprobs) == sum(row.num_trained for row in rows)
    sums = step_gradients(run.state.network, cut(rows, 32), run.objective)
    assert sums["loss"] == pytest.approx(-float(logprobs.mean()), rel=1e-6)
    assert sums["entropy"] == pytest.approx(float(entropy.mean()), rel=1e-6)


@pytest.mark.parametrize("settings", [{"micro_batch_tokens": 30}, {"packing": False}], ids=str)
def test_a_whole_run_does_not_depend_on_how_its_steps_are_cut(run_of: RunOf, settings: dict[str, object]) -> None:
    """Loss after six steps to 1e-4: AdamW divides by small gradients, which grows differences of 1e-7."""
    whole, other = Recorder(), Recorder()
    fit(run_of(callbacks=[whole]))
    fit(run_of(callbacks=[other], **settings))
    assert [m["loss"] for m in other.told] == pytest.approx([m["loss"] for m in whole.told], rel=1e-4)
    assert [m["tokens"] for m in other.told] == [m["tokens"] for m in whole.told]


@pytest.mark.parametrize(("every", "computed"), [(0, [1, 1]), (1, [2, 2]), (2, [2, 1])])
def test_checkpointing_computes_layers_again_and_gives_the_same_gradients(
    run_of: RunOf, rows_of: RowsOf, every: int, computed: list[int]
) -> None:
    run, plain = run_of(), run_of()
    checkpoint_layers(run.state.network, every)
    counts = [0, 0]

    def count(layer: int) -> Callable[..., None]:
        return lambda *_: counts.__setitem__(layer, counts[layer] + 1)

    for i, layer in enumerate(run.state.network.model.layers):
        layer.mlp.register_forward_pre_hook(count(i))
    for one in (run, plain):
        step_gradients(one.state.network, [collate(rows_of(8))], run.objective)
    assert counts == computed
    for name, parameter in plain.state.trained().items():
        assert torch.equal(run.state.trained()[name].grad, parameter.grad), name


def test_a_step_tells_these_metrics(run_of: RunOf) -> None:
    run = run_of(schedule="constant")
    metrics = train_step(run)
    assert list(metrics) == [
        *("step", "epoch", "loss", "entropy", "grad_norm", "learning_rate"),
        *("tokens", "seconds", "tokens_per_second", "memory_bytes"),
    ]
    num_tokens = sum(len(row) for row in run.plan.step(0))
    assert (metrics["step"], metrics["epoch"], metrics["tokens"]) == (1, pytest.approx(1 / 3, abs=1e-6), num_tokens)
    assert metrics["learning_rate"] == run.settings.learning_rate
    assert metrics["tokens_per_second"] == pytest.approx(num_tokens / metrics["seconds"])
    assert train_step(run)["tokens"] == num_tokens + sum(len(row) for row in run.plan.step(1))


def test_training_lowers_the_loss_and_leaves_the_base_as_it_is(run_of: RunOf) -> None:
    run, recorder = run_of(epochs=12, learning_rate=3e-2), Recorder()
    run.callbacks = [recorder]
    base = {n: p.clone() for n, p in run.state.network.named_parameters() if not p.requires_grad}
    fit(run)
    assert recorder.told[-1]["loss"] < recorder.told[0]["loss"] - 0.1
    assert all(torch.equal(run.state.network.get_parameter(name), value) for name, value in base.items())


def test_the_same_settings_give_the_same_run_and_another_seed_another(run_of: RunOf) -> None:
    def end(seed: int) -> dict[str, Tensor]:
        run = run_of(dropout=0.3, seed=seed)
        fit(run)
        return run.state.trained()

    first, again, other = end(1), end(1), end(2)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


@pytest.mark.parametrize("bound", [1e-3, None])
def test_gradients_are_clipped_to_the_norm_that_is_set(run_of: RunOf, bound: float | None) -> None:
    """After one step AdamW's mean of gradients is (1 - beta1) times the clipped gradient."""
    run = run_of(max_grad_norm=bound, optimizer={"beta1": 0.5})
    grad_norm = train_step(run)["grad_norm"]
    means = [value for name, value in run.state.tensors().items() if name.startswith("optimizer/exp_avg/")]
    clipped = float(torch.cat([m.flatten() for m in means]).norm()) / 0.5
    assert grad_norm > 1e-2
    assert clipped == pytest.approx(bound or grad_norm, rel=1e-3)


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_reported(
    run_of: RunOf, broken: Broken, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of()
    train_step(run)
    before = {name: value.clone() for name, value in run.state.tensors().items()}
    broken(run, [1])
    with caplog.at_level(logging.WARNING):
        train_step(run)
    assert all(torch.equal(value, before[name]) for name, value in run.state.tensors().items())
    assert caplog.messages == ["step 2: the gradient is nan; the step is left out"]
    assert (run.state.progress.step, run.state.progress.skipped_steps) == (2, 1)


def test_single_steps_that_are_left_out_do_not_end_a_run(run_of: RunOf, broken: Broken) -> None:
    run = run_of()
    broken(run, [0, 1, 3, 4])
    fit(run)
    assert run.state.progress.step == 6
    assert run.state.progress.skipped_steps == 0


def test_three_left_out_in_a_row_end_the_run_with_a_reason(run_of: RunOf, broken: Broken) -> None:
    run, recorder = run_of(), Recorder()
    run.callbacks = [recorder]
    broken(run, [1, 2, 3])
    with pytest.raises(TrainingError, match="step 4: the gradient was not finite for 3 steps in a row"):
        fit(run)
    assert recorder.events[-2:] == ["step 3", "end"]


def test_callbacks_hear_of_every_step_and_evaluation_in_order(run_of: RunOf, rows_of: RowsOf) -> None:
    recorder = Recorder()
    fit(run_of(callbacks=[recorder], eval_items=rows_of(4), eval_fraction=0.1, eval_every=4))
    steps = [f"step {i}" for i in range(1, 7)]
    assert recorder.events == [
        "start 0 of 6",
        "evaluation 0",
        *steps[:4],
        "evaluation 4",
        *steps[4:],
        "evaluation 6",
        "end",
    ]


def test_adapters_are_called_around_each_step_that_is_taken(run_of: RunOf, broken: Broken) -> None:
    class Listening(LoRA):
        before: ClassVar[list[Step]] = []
        after: ClassVar[list[int]] = []

        @classmethod
        def before_step(cls, adapters: Sequence[Adapter], step: Step) -> None:
            cls.before.append(step)

        @classmethod
        def after_step(cls, adapters: Sequence[Adapter], step: Step) -> None:
            cls.after.append(step.index)

    run = run_of(adapters=[Listening(nn.Linear(4, 4), Settings(r=2), name="layer")])
    broken(run, [2])
    fit(run)
    assert Listening.before == [Step(index, 6, run.settings.seed) for index in range(6)]
    assert Listening.after == [0, 1, 3, 4, 5]


def test_a_step_moves_parameters_by_their_multiple_of_the_scheduled_rate(run_of: RunOf) -> None:
    """AdamW's first step moves every number by its rate; B, which starts at zero, learns with 16 times A's."""
    network = run_of().state.network
    for adapter in (module for module in network.modules() if isinstance(module, LoRA)):
        adapter.settings = adapter.settings.model_copy(update={"lr_ratio_b": 16.0})
        nn.init.normal_(adapter.lora_B)
    before = {name: p.detach().clone() for name, p in network.named_parameters() if p.requires_grad}
    run = run_of(network=network, learning_rate=1e-3, schedule="constant", optimizer={"epsilon": 1e-30})
    train_step(run)
    for name, parameter in run.state.trained().items():
        rate = 1e-3 * (16 if name.endswith("lora_B") else 1)
        moved = (parameter - before[name]).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=1e-2, atol=0)


def test_what_adapters_add_to_the_loss_counts_once_a_step_however_it_is_cut(run_of: RunOf) -> None:
    class Shrinking(LoRA):
        @classmethod
        def penalty(cls, adapters: Sequence[Any]) -> Tensor:
            return torch.stack([adapter.lora_A.square().sum() for adapter in adapters]).sum()

    gradients = []
    for tokens in (None, 8):
        shrinking = Shrinking(nn.Linear(4, 4), Settings(r=2), name="layer")
        nn.init.ones_(shrinking.lora_A)
        run = run_of(adapters=[shrinking], micro_batch_tokens=tokens)
        train_step(run)
        gradients.append(shrinking.lora_A.grad)
    assert all(torch.equal(gradient, torch.full((2, 4), 2.0)) for gradient in gradients)


def test_the_evaluation_loss_is_the_mean_over_tokens_without_dropout(run_of: RunOf, rows_of: RowsOf) -> None:
    run, rows = run_of(dropout=0.5), rows_of(8)
    fit(run)
    losses = [evaluate_loss(run.state.network, batches, run.objective) for batches in cuts(rows).values()]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)
    assert run.state.network.training
    run.state.network.eval()
    assert losses[0] == pytest.approx(
        -float(score(run.state.network, collate(rows)).logprobs.detach().mean()), rel=1e-6
    )


def test_nothing_to_evaluate_on_is_an_error_and_not_a_division_by_zero(run_of: RunOf, rows_of: RowsOf) -> None:
    row = rows_of(1)[0]
    untrained = TokenSequence(row.token_ids, row.trained & False, row.origin)
    run = run_of()
    with pytest.raises(TrainingError, match="no sequence to evaluate on has a trained token"):
        evaluate_loss(run.state.network, [collate([untrained])], run.objective)


@pytest.mark.parametrize("patience", [1, 3])
def test_a_run_stops_after_so_many_evaluations_without_a_better_loss(
    run_of: RunOf, rows_of: RowsOf, patience: int
) -> None:
    """Random rows that are not trained on: learning others by heart makes them less likely."""
    recorder = Recorder()
    unseen = rows_of(8, seed=9)
    run = run_of(
        callbacks=[recorder], eval_items=unseen, eval_fraction=0.1, eval_every=1, early_stopping=patience, epochs=30
    )
    fit(run)
    losses = [m["eval_loss"] for m in recorder.told if "eval_loss" in m]
    assert run.state.progress.early_stopped
    assert run.state.progress.best_loss == min(losses)
    assert min(losses[-patience:]) > min(losses)
    assert len(losses) - 1 - losses.index(min(losses)) == patience


def test_an_evaluation_loss_that_is_not_finite_is_never_the_best(run_of: RunOf, rows_of: RowsOf) -> None:
    """The first evaluation gives nan, the later ones numbers: these are better."""
    run = run_of(eval_items=rows_of(4), eval_fraction=0.1, eval_every=1)
    sound = run.objective

    def objective(network: nn.Module, batch: TokenBatch) -> Loss:
        loss = sound(network, batch)
        broken = not network.training and run.state.progress.step == 0
        return Loss(loss.per_unit * float("nan"), unit="tokens") if broken else loss

    run.objective = objective
    fit(run)
    assert run.state.progress.best_loss is not None
    assert run.state.progress.best_loss < 5.0
