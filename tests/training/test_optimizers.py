"""What holds for every optimizer: nothing of a step that is left out, exact resume, groups, plans, and learning."""

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.data.batches import TokenBatch, collate
from luthier.data.sequences import TokenSequence
from luthier.models.attention import ATTENTION, register_attention
from luthier.objectives.loss import Loss
from luthier.recipe.optimizers import OptimizerSettings
from luthier.recipe.settings import type_names
from luthier.training import adam8bit
from luthier.training.checkpoints import Checkpoints
from luthier.training.loop import evaluate_loss, fit, train_step
from luthier.training.optimizers import OPTIMIZERS, step_if_finite
from luthier.training.run import Run

RunOf = Callable[..., Run]
RowsOf = Callable[..., list[TokenSequence]]
every_optimizer = pytest.mark.parametrize("word", OPTIMIZERS)


@pytest.fixture(autouse=True)
def _codes_in_small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adam8bit, "SMALLEST_NARROW", 256)


def network(*, narrow: bool = True) -> nn.Module:
    register_attention()
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": ATTENTION}
    made = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).train()
    return made.bfloat16() if narrow else made


def run_whole(run_of: RunOf, word: str, *, narrow: bool = True, **given: object) -> Run:
    """Of a model that is trained itself, with a rate that its optimizer learns well with."""
    settings = {"optimizer": word, "learning_rate": 1e-3 if word == "lion" else 5e-3, "adapter": None} | given
    return run_of(network=network(narrow=narrow), **settings)


def tensors(run: Run) -> dict[str, Tensor]:
    """Of the run's state, and its network's own parameters."""
    own = {f"network/{name}": p.detach() for name, p in run.state.network.named_parameters()}
    return {name: value.clone() for name, value in (run.state.tensors() | own).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in found.items() if not torch.equal(value, expected[name])] == []


def test_recipes_and_rules_know_the_same_words() -> None:
    assert OPTIMIZERS.keys() == set(type_names(OptimizerSettings))


@every_optimizer
@pytest.mark.parametrize("first", [True, False])
def test_a_step_that_is_not_finite_leaves_weights_moments_and_counts(run_of: RunOf, word: str, first: bool) -> None:
    """Also where it would have been the first: the next is then as if it had not been."""
    run, other = run_whole(run_of, word), run_whole(run_of, word)
    if not first:
        train_step(run)
        train_step(other)
    before, sound = tensors(run), run.objective

    def broken(network: nn.Module, batch: TokenBatch) -> Loss:
        loss = sound(network, batch)
        return Loss(loss.per_unit * torch.inf, unit=loss.unit)

    run.objective = broken
    train_step(run)
    if not first:
        assert_same(tensors(run), before)
    run.objective, run.state.progress = sound, deepcopy(other.state.progress)
    train_step(run)
    train_step(other)
    assert_same(tensors(run), tensors(other))


@every_optimizer
def test_a_resumed_run_ends_as_the_one_that_was_not_stopped(run_of: RunOf, tmp_path: Path, word: str) -> None:
    """And as one that neither saves nor evaluates in between."""

    def run(**given: object) -> Run:
        return run_whole(run_of, word, parameter_groups={"*.q_proj.*": 2}, layer_decay=0.9, **given)

    checkpoints = Checkpoints(tmp_path, keep_last=9, fingerprint="one")
    whole, plain = run(checkpoints=checkpoints, save_every=2), run(save_every=None)
    for one in (whole, plain):
        fit(one)
    resumed = run()
    checkpoints.load(tmp_path / "step-00000002", resumed.state)
    for _ in range(resumed.plan.num_steps - 2):
        train_step(resumed)
    resumed.state.eval()
    assert_same(tensors(resumed), tensors(whole))
    assert_same(tensors(plain), tensors(whole))


@every_optimizer
@pytest.mark.parametrize("narrow", [True, False], ids=["bf16", "fp32"])
def test_a_run_lowers_the_loss(run_of: RunOf, rows_of: RowsOf, word: str, narrow: bool) -> None:
    """By a tenth, on the rows that it saw."""
    run = run_whole(run_of, word, narrow=narrow, epochs=8)
    batches = [collate(rows_of(20))]
    before = evaluate_loss(run.state.network, batches, run.objective)
    fit(run)
    assert evaluate_loss(run.state.network, batches, run.objective) < 0.9 * before


@every_optimizer
def test_a_weight_without_gradient_decays_by_its_groups_rate(run_of: RunOf, word: str) -> None:
    """(1 - rate * ratio * decay) of it stays; 2e-7 of it for rounding."""
    named = {"*.q_proj.*": {"rate_ratio": 3.0}, "*.k_proj.*": {"weight_decay": 0.0}}
    run = run_whole(run_of, word, narrow=False, weight_decay=0.5, layer_decay=0.5, parameter_groups=named)
    before = {name: p.detach().clone() for name, p in run.state.network.named_parameters()}
    for parameter in run.state.network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for group in run.state.optimizer.param_groups:
        group["lr"] = 0.01 * group["rate_ratio"]
    step_if_finite(run.state.optimizer, torch.ones(()))
    for name, parameter in run.state.network.named_parameters():
        layer, ratio = 0.5 if ".layers.0." in name else 1.0, 3.0 if "q_proj" in name else 1.0
        spared = any(part in name for part in ("norm", "embed", "k_proj"))
        kept = 1.0 if spared else 1 - 0.01 * layer * ratio * 0.5
        torch.testing.assert_close(parameter.detach(), before[name] * kept, rtol=2e-7, atol=0)


@every_optimizer
def test_a_step_leaves_the_gradients(run_of: RunOf, word: str) -> None:
    """Which some adapters look at afterwards."""
    run = run_whole(run_of, word, narrow=False, weight_decay=0.1)
    gradients = {p: torch.full_like(p, 0.1) for p in run.state.network.parameters()}
    for parameter, gradient in gradients.items():
        parameter.grad = gradient.clone()
    step_if_finite(run.state.optimizer, torch.ones(()))
    assert all(torch.equal(p.grad, gradient) for p, gradient in gradients.items())


@every_optimizer
def test_what_is_held_before_a_step_is_what_a_step_stores(run_of: RunOf, word: str) -> None:
    """In names and sizes, with values and without, as a plan counts it; and no weight is another."""
    stored = run_whole(run_of, word, narrow=False)
    for parameter in stored.state.network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step_if_finite(stored.state.optimizer, torch.ones(()))
    expected = {name: value.nbytes for name, value in stored.state.tensors().items()}
    assert len(expected) > 40
    for mode in (FakeTensorMode(), nullcontext()):
        with mode:
            run = run_whole(run_of, word, narrow=False)
            before = [p.detach().clone() for p in run.state.network.parameters()]
            run.state.hold_all()
            assert {name: value.nbytes for name, value in run.state.tensors().items()} == expected
    assert all(map(torch.equal, run.state.network.parameters(), before))


@pytest.mark.parametrize("narrow", [True, False], ids=["bf16", "fp32"])
def test_averages_are_evaluated_saved_and_left_and_never_trained_at(
    run_of: RunOf, rows_of: RowsOf, tmp_path: Path, narrow: bool
) -> None:
    """x = y + (z - y) (1 - 1 / b1) of schedule_free."""
    items, told = rows_of(8, seed=7), []

    class Listen:
        def on_start(self, step: int, num_steps: int) -> None: ...

        def on_metrics(self, metrics: dict[str, float]) -> None:
            told.append(metrics)

        def on_end(self) -> None: ...

    checkpoints = Checkpoints(tmp_path, keep_last=9, fingerprint="one")
    evaluated = {"eval_items": items, "eval_every": 1, "eval_data": "held_out.jsonl", "callbacks": [Listen()]}
    run = run_whole(run_of, "schedule_free", narrow=narrow, checkpoints=checkpoints, **evaluated)
    fit(run)
    state = run.state.optimizer.state
    for name, master in run.state.trained().items():
        y, z = state[master]["y"], state[master]["z"]
        assert torch.equal(master, y.lerp(z, 1 - 1 / 0.9)), name
        assert torch.equal(run.state.network.get_parameter(name), master.to(run.state.network.dtype))
    assert any(not torch.equal(values["y"], p) for p, values in state.items())
    assert told[-1]["eval_loss"] == pytest.approx(
        evaluate_loss(run.state.network, [collate(items)], run.objective), rel=1e-6
    )
    kept = {name: values["y"].clone() for name, p in run.state.trained().items() if (values := state[p])}
    run.state.train()
    assert all(torch.equal(p, kept[name]) for name, p in run.state.trained().items())


def test_a_checkpoint_from_before_the_first_step_leaves_no_moments(run_of: RunOf, tmp_path: Path) -> None:
    run = run_whole(run_of, "schedule_free")
    checkpoints = Checkpoints(tmp_path, keep_last=9, fingerprint="one")
    first, before = checkpoints.save(run.state), tensors(run)
    train_step(run)
    checkpoints.load(first, run.state)
    assert_same(tensors(run), before)
