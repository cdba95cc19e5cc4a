"""A network trained in bfloat16 learns as one in float32: masters take what it would round away."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.data.batches import TokenBatch, collate
from luthier.data.sequences import TokenSequence
from luthier.errors import TrainingError
from luthier.models.attention import ATTENTION, register_attention
from luthier.objectives.loss import Loss
from luthier.training.callbacks import Callback
from luthier.training.checkpoints import Checkpoints, load_trained
from luthier.training.loop import fit, step_gradients, train_step
from luthier.training.optimizers import make_optimizer
from luthier.training.precision import Precision, float32_masters
from luthier.training.run import Run

RowsOf = Callable[..., list[TokenSequence]]
RunOf = Callable[..., Run]
FULL = {"adapter": None, "schedule": "constant"}


def wide_network(*, tied: bool = False) -> LlamaForCausalLM:
    """In float32, all of it trained."""
    register_attention()
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": ATTENTION}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)).train()


def narrow(network: nn.Module) -> nn.Module:
    return deepcopy(network).bfloat16()


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def share_moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    moved = sum(int((after[name] != value).sum()) for name, value in before.items())
    return moved / sum(value.numel() for value in before.values())


def test_masters_take_updates_that_bfloat16_rounds_away(run_of: RunOf) -> None:
    """A rate of 1e-6 moves every weight by about that a step. bfloat16's numbers near 0.02, where most weights are,
    stand 1e-4 apart.
    """
    run, plain = run_of(network=narrow(wide_network()), learning_rate=1e-6, **FULL), narrow(wide_network())
    masters = {name: p.detach().clone() for name, p in run.state.trained().items()}
    rounded = {name: p.detach().clone() for name, p in plain.named_parameters()}
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-6, weight_decay=0.0)
    for step in range(run.plan.num_steps):
        optimizer.zero_grad()
        step_gradients(plain, run.cut(step), run.objective)
        optimizer.step()
    fit(run)
    assert share_moved(masters, run.state.trained()) > 0.95
    assert share_moved(rounded, dict(plain.named_parameters())) < 0.05


def test_after_every_step_the_parameters_are_the_masters_rounded(run_of: RunOf) -> None:
    run = run_of(network=narrow(wide_network()), **FULL)
    for _ in range(3):
        train_step(run)
        for name, parameter in run.state.network.named_parameters():
            assert torch.equal(parameter, run.state.trained()[name].bfloat16()), name


@pytest.mark.parametrize("size", [8, 4, 1], ids=["1x8", "2x4", "8x1"])
def test_gradients_of_micro_batches_add_up_in_float32(run_of: RunOf, rows_of: RowsOf, size: int) -> None:
    """n summands a_i in float32: off by at most (n - 1) 2^-24 sum |a_i|, plus the sum's own rounding. In bfloat16
    eight summands would be off by up to 65,536 times as much.
    """
    network, rows = wide_network(), rows_of(8)
    run, plain = run_of(network=narrow(network), **FULL), narrow(network)
    num_trained = sum(row.num_trained for row in rows)
    batches = [collate(rows[i : i + size]) for i in range(0, 8, size)]
    summands: dict[str, list[Tensor]] = {name: [] for name, _ in plain.named_parameters()}
    for batch in batches:
        plain.zero_grad()
        (run.objective(plain, batch).per_unit.sum() / num_trained).backward()
        for name, gradient in gradients(plain).items():
            summands[name].append(gradient.double())
    step_gradients(run.state.network, batches, run.objective)
    for name, master in run.state.trained().items():
        exact = torch.stack(summands[name])
        bound = len(batches) * 2**-24 * exact.abs().sum(0)
        assert ((master.grad.double() - exact.sum(0)).abs() <= bound).all(), name


def test_the_gradient_does_not_depend_on_how_a_step_is_cut(run_of: RunOf, rows_of: RowsOf) -> None:
    """Each micro-batch's gradient is rounded once, to 2^-9 of itself, and the whole's too: |g - g_whole| is at most
    2^-9 (sum |g_i| + |g_whole|), in norms. Doubled, since activations that differ in their last bit add as much.
    """
    rows, found = rows_of(8), {}
    for size in (8, 4, 1):
        run = run_of(network=narrow(wide_network()), **FULL)
        norms = 0.0
        batches = [collate(rows[i : i + size]) for i in range(0, 8, size)]
        step_gradients(run.state.network, batches, run.objective)
        for batch in batches:
            other = run_of(network=narrow(wide_network()), **FULL)
            share = batch.count("tokens") / sum(row.num_trained for row in rows)
            step_gradients(other.state.network, [batch], run.objective)
            norms += share * float(torch.nn.utils.get_total_norm(p.grad for p in other.state.trained().values()))
        found[size] = torch.cat([p.grad.flatten() for p in run.state.trained().values()]), norms
    whole, norm = found[8]
    for size in (4, 1):
        gradient, norms = found[size]
        assert 0 < float((gradient - whole).norm()) <= 2 * 2**-9 * (norms + norm), size


def test_narrow_gradients_are_freed_one_by_one(run_of: RunOf, rows_of: RowsOf) -> None:
    run, alive = run_of(network=narrow(wide_network()), **FULL), []
    parameters = list(run.state.network.parameters())
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda _: alive.append(len(gradients(run.state.network))))
    step_gradients(run.state.network, [collate(rows_of(8))], run.objective)
    assert alive == [0] * len(parameters)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in run.state.trained().values())


def test_a_gradient_that_is_thrown_away_leaves_nothing_behind(run_of: RunOf, rows_of: RowsOf) -> None:
    """As before the first step, when the largest micro-batch is tried."""
    run, other = run_of(network=narrow(wide_network()), **FULL), run_of(network=narrow(wide_network()), **FULL)
    step_gradients(run.state.network, [collate(rows_of(8, seed=3))], run.objective)
    run.state.optimizer.zero_grad(set_to_none=True)
    train_step(run)
    train_step(other)
    assert all(torch.equal(value, other.state.tensors()[name]) for name, value in run.state.tensors().items())


def test_masters_start_from_the_stored_weights(run_of: RunOf) -> None:
    stored = wide_network()
    kept = {name: p.detach().clone() for name, p in stored.named_parameters()}
    run = run_of(network=narrow(stored), stored=dict(stored.named_parameters()), **FULL)
    assert all(torch.equal(p, kept[name]) for name, p in run.state.trained().items())
    assert any(not torch.equal(p, p.bfloat16().float()) for p in run.state.trained().values())


def test_stored_weights_of_another_model_are_not_taken(run_of: RunOf) -> None:
    network = narrow(wide_network())
    other = {name: p.detach() * 1.5 for name, p in wide_network().named_parameters()}
    run = run_of(network=network, stored=other, **FULL)
    assert all(torch.equal(p, network.get_parameter(name).float()) for name, p in run.state.trained().items())


def test_float32_parameters_are_their_own_masters_and_cost_nothing(run_of: RunOf) -> None:
    run = run_of()
    run.state.network.bfloat16()
    for parameter in run.state.trained().values():
        parameter.data = parameter.data.float()
    assert float32_masters(run.state.network) == {}
    assert all(run.state.network.get_parameter(name) is p for name, p in run.state.trained().items())


def test_tied_weights_have_one_master_and_stay_tied(run_of: RunOf) -> None:
    run = run_of(network=narrow(wide_network(tied=True)), **FULL)
    fit(run)
    network, trained = run.state.network, run.state.trained()
    assert "lm_head.weight" not in trained
    assert network.lm_head.weight is network.model.embed_tokens.weight
    assert torch.equal(network.lm_head.weight, trained["model.embed_tokens.weight"].bfloat16())
    assert sum(len(group["params"]) for group in run.state.optimizer.param_groups) == len(trained)


def test_the_frozen_stays_frozen_and_has_no_master(run_of: RunOf) -> None:
    network = narrow(wide_network())
    network.model.embed_tokens.requires_grad_(False)
    before = network.model.embed_tokens.weight.clone()
    run = run_of(network=network, **FULL)
    fit(run)
    assert torch.equal(network.model.embed_tokens.weight, before)
    assert set(float32_masters(network)) == {p for n, p in network.named_parameters() if "embed_tokens" not in n}


def test_the_curve_is_that_of_float32(run_of: RunOf) -> None:
    """To 2^-8 of the loss, what rounding a product's two factors costs, while the loss falls by a third."""
    curves: dict[str, list[float]] = {}
    for name, network in {"fp32": wide_network(), "bf16": narrow(wide_network())}.items():
        stored = dict(wide_network().named_parameters())
        run = run_of(network=network, stored=stored, learning_rate=5e-3, epochs=8, **FULL)
        curves[name] = [float(train_step(run)["loss"]) for _ in range(run.plan.num_steps)]
    assert curves["fp32"][-1] < 2 / 3 * curves["fp32"][0]
    assert curves["bf16"] == pytest.approx(curves["fp32"], rel=2**-8)


def test_a_resumed_run_is_the_run_that_was_not_stopped(
    run_of: RunOf, stop_at: Callable[[int], Callback], tmp_path: Path
) -> None:
    def run(folder: str, *callbacks: Callback) -> Run:
        checkpoints = Checkpoints(tmp_path / folder, keep_last=2, fingerprint="one")
        settings = {"learning_rate": 1e-5, "save_every": 3, "checkpoints": checkpoints, "callbacks": callbacks}
        made = run_of(
            network=narrow(wide_network()), stored=dict(wide_network().named_parameters()), **settings, **FULL
        )
        if found := checkpoints.latest():
            checkpoints.load(found, made.state)
        return made

    whole = run("whole")
    fit(whole)
    with pytest.raises(KeyboardInterrupt):
        fit(run("stopped", stop_at(4)))
    resumed = run("stopped")
    assert resumed.state.progress.step == 3
    fit(resumed)
    found = resumed.state.tensors()
    assert all(torch.equal(value, found[name]) for name, value in whole.state.tensors().items())
    for name, parameter in whole.state.network.named_parameters():
        assert torch.equal(parameter, resumed.state.network.get_parameter(name)), name


def test_a_checkpoint_gives_its_masters_to_a_wide_network(run_of: RunOf, tmp_path: Path) -> None:
    run, wide = run_of(network=narrow(wide_network()), learning_rate=1e-5, **FULL), wide_network()
    train_step(run)
    load_trained(wide, Checkpoints(tmp_path, keep_last=1, fingerprint="one").save(run.state))
    assert all(torch.equal(p, run.state.trained()[name]) for name, p in wide.named_parameters())
    assert not any(torch.equal(p, p.bfloat16().float()) for p in wide.parameters() if p.ndim > 1)


def test_a_gradient_that_is_not_finite_changes_neither_masters_nor_parameters(run_of: RunOf) -> None:
    run = run_of(network=narrow(wide_network()), **FULL)
    train_step(run)
    before = {name: value.clone() for name, value in run.state.tensors().items()}
    narrow_before = deepcopy(run.state.network.state_dict())
    sound = run.objective

    def broken(network: nn.Module, batch: TokenBatch) -> Loss:
        loss = sound(network, batch)
        return Loss(loss.per_unit * torch.inf, unit=loss.unit)

    run.objective = broken
    train_step(run)
    assert run.state.progress.skipped_steps == 1
    assert all(torch.equal(value, before[name]) for name, value in run.state.tensors().items())
    assert all(torch.equal(value, narrow_before[name]) for name, value in run.state.network.state_dict().items())


def test_a_network_gives_its_gradients_to_one_run_at_a_time(run_of: RunOf, rows_of: RowsOf) -> None:
    network, batch = narrow(wide_network()), collate(rows_of(8))
    first, second = run_of(network=network, **FULL), run_of(network=network, **FULL)
    with pytest.raises(TrainingError, match="another run collects this network's gradients"):
        step_gradients(network, [batch], second.objective)
    first.state.precision.close()
    network.zero_grad()
    first.state.optimizer.zero_grad()
    step_gradients(network, [batch], second.objective)
    assert all(p.grad is None for p in first.state.trained().values())
    assert all(p.grad is not None for p in second.state.trained().values())


def test_no_optimizer_is_made_for_narrow_parameters_without_masters(run_of: RunOf) -> None:
    network = narrow(wide_network())
    with pytest.raises(AssertionError, match="has no master"):
        make_optimizer(network, run_of().settings, Precision())


def test_nothing_is_read_from_the_device_between_backward_and_step(run_of: RunOf) -> None:
    """Every read of a number passes through one of these methods of Tensor."""
    events: list[str] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            name = getattr(func, "__name__", "")
            if name in {"__bool__", "__float__", "__int__", "backward", "cpu", "item", "numpy", "tolist"}:
                events.append(name)
            return func(*args, **kwargs or {})

    for run in (run_of(), run_of(network=narrow(wide_network()), **FULL)):
        run.state.optimizer.register_step_post_hook(lambda *_: events.append("step"))
        with Watch():
            train_step(run)
        after = events[len(events) - events[::-1].index("backward") :]
        assert after[0] == "step"
        assert {"__float__", "tolist"} & set(after)
        events.clear()
