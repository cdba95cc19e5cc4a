"""The loss's scale follows its formulas; a float16 run recovers from overflows, and learns as one in float32."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.adapters.inject import inject
from luthier.adapters.lora import LoRA as LoRALayer
from luthier.data.batches import TokenBatch
from luthier.errors import TrainingError
from luthier.models.attention import ATTENTION, register_attention
from luthier.objectives.loss import Loss
from luthier.recipe.adapters import LoRA
from luthier.recipe.precision import DynamicScaling, LossScaling, StaticScaling
from luthier.training.callbacks import Metrics
from luthier.training.checkpoints import Checkpoints
from luthier.training.loop import fit, train_step
from luthier.training.loss_scaling import LossScale, first_scale, next_scale, unscale
from luthier.training.run import Objective, Run

RunOf = Callable[..., Run]
SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
FULL = {"adapter": None, "schedule": "constant", "learning_rate": 1e-3}
FP16 = FULL | {"dtype": "fp16"}
UNBOUND = {"floor": 2.0**-100, "ceiling": 2.0**100}


def network(dtype: torch.dtype, *, adapter: bool = False) -> nn.Module:
    """The same weights in every type."""
    register_attention()
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, attn_implementation=ATTENTION)
    made = LlamaForCausalLM(config).to(dtype).train()
    if adapter:
        inject(made.requires_grad_(False), LoRA(r=4), seed=0)
    return made


def states(scaling: LossScaling | None, finite: list[bool]) -> list[LossScale]:
    """The states that these steps lead through, the first one first."""
    found = [first_scale(scaling)]
    for step in finite:
        found.append(next_scale(found[-1], scaling, finite=step))
    return found


def overflowing(run: Run, steps: set[int]) -> None:
    """Makes one gradient infinite in these steps, by a hook on the narrow parameter."""
    parameter = next(p for p in run.state.network.parameters() if p.requires_grad)

    def spoil(gradient: Tensor) -> Tensor:
        return gradient * torch.inf if run.state.progress.step in steps else gradient

    parameter.register_hook(spoil)


def faint(objective: Objective, network: nn.Module, batch: TokenBatch) -> Loss:
    loss = objective(network, batch)
    return replace(loss, per_unit=loss.per_unit * 1e-6)


def trained(run: Run) -> list[Metrics]:
    return [train_step(run) for _ in range(run.plan.num_steps)]


@given(
    finite=st.lists(st.booleans() | st.just(True), max_size=60),
    initial=st.sampled_from([1.0, 3.0, 1024.0, 2.0**16]),
    growth=st.sampled_from([1.5, 2.0, 4.0]),
    backoff=st.sampled_from([0.25, 0.5, 0.9]),
    interval=st.integers(1, 6),
)
def test_the_scale_follows_pytorchs_update(
    finite: list[bool], initial: float, growth: float, backoff: float, interval: int
) -> None:
    """To 60 roundings of float32, in which PyTorch keeps the scale; floor and ceiling are out of reach."""
    scaling = DynamicScaling(initial=initial, growth=growth, backoff=backoff, interval=interval, **UNBOUND)
    scale, tracker = torch.tensor(initial), torch.zeros((), dtype=torch.int32)
    for found, step in zip(states(scaling, finite)[1:], finite, strict=True):
        torch._amp_update_scale_(scale, tracker, torch.tensor(float(not step)), growth, backoff, interval)
        assert found.scale == pytest.approx(float(scale), rel=60 * 2**-24)
        assert found.good_steps == int(tracker)


@given(st.lists(st.booleans(), max_size=200), st.integers(-20, 0), st.integers(0, 20))
def test_the_scale_never_leaves_floor_and_ceiling(finite: list[bool], low: int, high: int) -> None:
    scaling = DynamicScaling(initial=1.0, interval=1, floor=2.0**low, ceiling=2.0**high)
    found = states(scaling, finite)
    assert all(scaling.floor <= state.scale <= scaling.ceiling for state in found)
    for before, after, step in zip(found, found[1:], finite, strict=False):
        bound = min(2 * before.scale, scaling.ceiling) if step else max(before.scale / 2, scaling.floor)
        assert after.scale == bound


def test_a_long_quiet_run_grows_once_an_interval() -> None:
    found = states(DynamicScaling(), [True] * 8001)
    assert [found[i].scale for i in (0, 1999, 2000, 4000, 8000)] == [2.0**i for i in (16, 16, 17, 18, 20)]
    assert found[8001] == LossScale(2.0**20, 1)
    assert states(DynamicScaling(), [True] * 1999 + [False])[-1] == LossScale(2.0**15)


@pytest.mark.parametrize("scaling", [None, StaticScaling(scale=8.0)], ids=["none", "static"])
def test_a_scale_that_is_not_dynamic_stays(scaling: LossScaling | None) -> None:
    assert set(states(scaling, [True, False] * 2000)) == {LossScale(1.0 if scaling is None else 8.0)}


@given(st.floats(2.0**-99, 2.0**10, width=32), st.integers(-10, 24))
def test_unscaling_undoes_a_power_of_two_and_keeps_what_is_not_finite(value: float, exponent: int) -> None:
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([value * 2.0**exponent, math.inf, math.nan])
    unscale([parameter, nn.Parameter(torch.zeros(1))], 2.0**exponent)
    assert parameter.grad[0] == torch.tensor(value)
    assert parameter.grad.isfinite().tolist() == [True, False, False]


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapter"])
@pytest.mark.parametrize(("scale", "bound"), [(1.0, 2**-8), (2.0**15, 2**-11)])
def test_the_gradient_does_not_depend_on_the_scale(run_of: RunOf, adapter: bool, scale: float, bound: float) -> None:
    """Against a scale of 1,024, relative to each tensor's largest entry: to a rounding of float16, 2^-11.

    Unscaled gradients of this network lie around 1e-4, and what they are made of in part below 6e-5, where float16 has
    fewer bits; hence the greater bound there.
    """
    updates = []
    for factor in (scale, 1024.0):
        fixed = {"loss_scaling": {"type": "static", "scale": factor}, "max_grad_norm": None}
        run = run_of(network=network(torch.float16, adapter=adapter), **FP16, **fixed)
        assert train_step(run)["loss_scale"] == factor
        updates.append({name: run.state.optimizer.state[p]["exp_avg"] for name, p in run.state.trained().items()})
    for name, one in updates[1].items():
        torch.testing.assert_close(updates[0][name], one, rtol=0, atol=bound * float(one.abs().max()), msg=name)


def test_scaling_saves_what_float16_makes_zero(run_of: RunOf) -> None:
    """A loss of a millionth has gradients below 2^-24; scaled, they are the loss's own over a million."""
    norms = {}
    for scaling in ("none", "static"):
        run = run_of(network=network(torch.float16), **FP16, loss_scaling=scaling)
        run.objective = partial(faint, run.objective)
        norms[scaling] = train_step(run)["grad_norm"]
    whole = train_step(run_of(network=network(torch.float32), **FULL))["grad_norm"]
    assert norms["static"] == pytest.approx(1e-6 * whole, rel=2**-8)
    assert norms["none"] < 0.9 * norms["static"]


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapter"])
def test_a_run_recovers_from_overflows_and_ends_near_float32(run_of: RunOf, adapter: bool) -> None:
    """Near a float32 run that lost the same steps: to 2^-9 of the loss, a few roundings of float16."""
    lost, given = {0, 7, 9, 10}, {"epochs": 10, "loss_scaling": {"interval": 3, "ceiling": 2.0**17}}
    run = run_of(network=network(torch.float16, adapter=adapter), **FP16, **given)
    wide = run_of(network=network(torch.float32, adapter=adapter), **FULL, epochs=10)
    overflowing(run, lost)
    overflowing(wide, lost)
    told, expected = trained(run), trained(wide)
    scales = [math.log2(metrics["loss_scale"]) for metrics in told]
    assert scales[:15] == [16, 15, 15, 15, 16, 16, 16, 17, 16, 16, 15, 14, 14, 14, 15]
    assert {i for i, m in enumerate(told) if not math.isfinite(m["grad_norm"])} == lost
    assert told[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=2**-9)
    assert told[-1]["loss"] < told[0]["loss"]


def test_an_initial_scale_that_is_too_great_is_given_up_step_by_step(run_of: RunOf) -> None:
    """A real overflow: more than three steps in a row are left out, and the run goes on."""
    run = run_of(network=network(torch.float16), **FP16, epochs=8, loss_scaling={"initial": 2.0**24})
    told = trained(run)
    left_out = [i for i, metrics in enumerate(told) if not math.isfinite(metrics["grad_norm"])]
    assert left_out[:4] == [0, 1, 2, 3]
    assert told[-1]["loss"] < told[0]["loss"]
    assert run.state.progress.skipped_steps == 0


def test_an_overflow_at_the_floor_ends_the_run(run_of: RunOf) -> None:
    run = run_of(network=network(torch.float16), **FP16, loss_scaling={"initial": 4.0})
    overflowing(run, set(range(99)))
    with pytest.raises(TrainingError, match="step 3: the gradient overflows fp16 with loss_scaling at its floor, 1;"):
        fit(run)


@pytest.mark.parametrize("scaling", ["none", "static"])
def test_a_scale_that_stays_allows_no_three_overflows_in_a_row(run_of: RunOf, scaling: str) -> None:
    run = run_of(network=network(torch.float16), **FP16, loss_scaling=scaling)
    overflowing(run, set(range(99)))
    with pytest.raises(TrainingError, match="step 3: the gradient was not finite for 3 steps in a row"):
        fit(run)


def test_a_resumed_run_is_the_whole_run(run_of: RunOf, tmp_path: Path) -> None:
    """Stopped two steps after an overflow, with two of three good steps counted: scale and count go on."""

    def made(folder: str) -> Run:
        checkpoints = Checkpoints(tmp_path / folder, keep_last=1, fingerprint="one")
        run = run_of(network=network(torch.float16), checkpoints=checkpoints, loss_scaling={"interval": 3}, **FP16)
        overflowing(run, {1})
        if found := checkpoints.latest():
            checkpoints.load(found, run.state)
        return run

    whole, stopped = made("whole"), made("stopped")
    told = trained(whole)
    for _ in range(4):
        train_step(stopped)
    assert stopped.checkpoints is not None
    stopped.checkpoints.save(stopped.state)
    resumed = made("stopped")
    assert (resumed.state.progress.loss_scale, resumed.state.progress.good_steps) == (2.0**15, 2)
    assert [train_step(resumed)["loss_scale"] for _ in range(2)] == [m["loss_scale"] for m in told[4:]]
    assert resumed.state.progress == whole.state.progress
    found = resumed.state.tensors()
    assert all(torch.equal(value, found[name]) for name, value in whole.state.tensors().items())


def test_what_adapters_add_to_the_loss_is_scaled_with_it(run_of: RunOf) -> None:
    class Shrinking(LoRALayer):
        @classmethod
        def penalty(cls, adapters: Sequence[Any]) -> Tensor:
            return torch.stack([adapter.lora_A.square().sum() for adapter in adapters]).sum()

    run = run_of(network=network(torch.float16, adapter=True), max_grad_norm=None, **FP16)
    shrinking = Shrinking(nn.Linear(4, 4), LoRA(r=2), name="layer")
    nn.init.ones_(shrinking.lora_A)
    run.state.network.add_module("beside", shrinking)
    run.adapters = [shrinking]
    train_step(run)
    assert shrinking.lora_A.grad is not None
    assert torch.equal(shrinking.lora_A.grad, torch.full((2, 4), 2.0))
