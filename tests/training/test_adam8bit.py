"""Codes and steps are bitsandbytes' to the bit, the state is a quarter, and what is not finite changes nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from luthier.quant.dynamic import dynamic_map
from luthier.training import adam8bit
from luthier.training.adam8bit import BLOCK, dequantize, quantize
from luthier.training.checkpoints import Checkpoints
from luthier.training.loop import train_step
from luthier.training.optimizers import Optimizer, step_if_finite
from luthier.training.run import Run

RunOf = Callable[..., Run]


@pytest.fixture(scope="module")
def theirs() -> Any:
    reason = "bitsandbytes 0.50 is not installed: its numbers cannot be compared with"
    return pytest.importorskip("bitsandbytes", minversion="0.50", reason=reason)


def optimizer_of(*parameters: nn.Parameter, block: int = BLOCK, wide: bool = False, **given: float) -> Optimizer:
    """adam8bit over one group, with AdamW's usual numbers."""
    numbers = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.0} | given
    return Optimizer([{"params": parameters, "rule": adam8bit.adam8bit(block), "wide": wide, **numbers}])


def gradients(num: int, shape: tuple[int, ...] = (300, 100)) -> list[Tensor]:
    """Of very different sizes within a block, as real ones are."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw) * torch.rand(shape, generator=draw) ** 3 for _ in range(num)]


def a_parameter(shape: tuple[int, ...] = (300, 100)) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(v.nbytes for values in optimizer.state.values() for v in values.values())


def take(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, gradient: Tensor) -> None:
    parameter.grad = gradient.clone()
    step_if_finite(optimizer, gradient.norm())


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_bitsandbytes(theirs: Any, signed: bool) -> None:
    assert torch.equal(dynamic_map(signed=signed), theirs.functional.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("block", [256, 2048])
@pytest.mark.parametrize("signed", [True, False])
def test_codes_and_values_are_bitsandbytes(theirs: Any, signed: bool, block: int) -> None:
    """Also where the last block is not full."""
    values = torch.cat([g.flatten() for g in gradients(2)])[:50_001]
    values = values if signed else values.square()
    codes, absmax = quantize(values, signed=signed, block=block)
    expected, state = theirs.functional.quantize_blockwise(values, code=dynamic_map(signed=signed), blocksize=block)
    assert torch.equal(codes, expected)
    assert torch.equal(absmax, state.absmax)
    wide = dequantize(codes, absmax, signed=signed, block=block)
    assert torch.equal(wide, theirs.functional.dequantize_blockwise(expected, state))


@settings(max_examples=60, deadline=None)
@given(
    exponents=st.lists(st.floats(-12, 12), min_size=1, max_size=40),
    signed=st.booleans(),
    block=st.sampled_from([4, 16, 2048]),
)
def test_what_is_stored_is_within_the_maps_gap(exponents: list[float], signed: bool, block: int) -> None:
    """Half a gap of the map about the value, and half a step of the grid (1 / 65,535) for each of two roundings to it,
    all in units of the block's largest value; 1e-6 for float32.
    """
    values = torch.tensor([(-1) ** i * 10**e for i, e in enumerate(exponents)])
    values = values if signed else values.abs()
    codes, absmax = quantize(values, signed=signed, block=block)
    largest = absmax.repeat_interleave(block)[: len(values)]
    wide, scaled = dequantize(codes, absmax, signed=signed, block=block) / largest, values / largest
    levels = dynamic_map(signed=signed)
    above = torch.searchsorted(levels, scaled).clamp(1, 255)
    gap = (levels[above] - levels[above - 1]).where(scaled > levels[0], scaled.new_tensor(0.015))
    assert ((wide - scaled).abs() <= gap / 2 + 2 / 65535 + 1e-6).all()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_are_bitsandbytes_to_the_bit(theirs: Any, weight_decay: float) -> None:
    """With its blocks of 256. Codes, scales and weights, over twenty steps."""
    ours, other = a_parameter(), a_parameter()
    optimizer = optimizer_of(ours, lr=1e-3, weight_decay=weight_decay, block=256)
    expected = theirs.optim.AdamW8bit([other], lr=1e-3, weight_decay=weight_decay)
    for gradient in gradients(20):
        take(optimizer, ours, gradient)
        other.grad = gradient.clone()
        expected.step()
    state, peer = optimizer.state[ours], expected.state[other]
    for name, number in (("exp_avg", 1), ("exp_avg_sq", 2)):
        assert torch.equal(state[f"{name}_codes"], peer[f"state{number}"].flatten())
        assert torch.equal(state[f"{name}_absmax"], peer[f"absmax{number}"])
    torch.testing.assert_close(ours, other, rtol=0, atol=2.4e-7)  # two roundings of weights up to 4


def test_a_step_from_stored_moments_is_adams_in_float64() -> None:
    """Of blocks of 2048; 1e-6 of the rate's size: float32."""
    parameter, (first, second) = a_parameter(), gradients(2)
    optimizer = optimizer_of(parameter, beta2=0.99, epsilon=1e-6, weight_decay=0.1)
    take(optimizer, parameter, first)
    before, state = parameter.detach().double(), {k: v.clone() for k, v in optimizer.state[parameter].items()}
    take(optimizer, parameter, second)
    m, v = (
        dequantize(state[f"{name}_codes"], state[f"{name}_absmax"], signed=signed).view_as(second).double()
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False))
    )
    m, v = 0.9 * m + 0.1 * second, 0.99 * v + 0.01 * second.double() ** 2
    expected = before * (1 - 0.001) - 0.01 * (m / (1 - 0.9**2)) / ((v / (1 - 0.99**2)).sqrt() + 1e-6)
    torch.testing.assert_close(parameter.double(), expected, rtol=0, atol=1e-6)


def test_the_state_is_a_quarter_of_adamws() -> None:
    parameters = [a_parameter((512, 512)), a_parameter((2048, 300))]
    narrow, wide = optimizer_of(*parameters), torch.optim.AdamW(parameters, fused=True)
    for optimizer in (narrow, wide):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert state_bytes(narrow) <= 0.26 * state_bytes(wide)


def test_small_parameters_and_wide_groups_are_adamw() -> None:
    small, large = a_parameter((4095,)), a_parameter((4096,))
    narrow, kept_wide = optimizer_of(small, weight_decay=0.1), optimizer_of(large, weight_decay=0.1, wide=True)
    same = [a_parameter((4095,)), a_parameter((4096,))]
    wide = torch.optim.AdamW(same, lr=1e-2, weight_decay=0.1, fused=True)
    for ours, other in zip((small, large), same, strict=True):
        ours.grad = other.grad = ours.detach().sin()
    for optimizer in (narrow, kept_wide, wide):
        for _ in range(3):
            optimizer.step()
    assert torch.equal(small, same[0])
    assert torch.equal(large, same[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(300, 100), (10,)])
def test_a_gradient_that_is_not_finite_changes_nothing(shape: tuple[int, ...], bad: float) -> None:
    parameter, (first, second) = a_parameter(shape), gradients(2, shape)
    optimizer = optimizer_of(parameter)
    second.view(-1)[3] = bad
    take(optimizer, parameter, first)
    kept, state = parameter.detach().clone(), {k: v.clone() for k, v in optimizer.state[parameter].items()}
    take(optimizer, parameter, second)
    assert torch.equal(parameter, kept)
    assert all(torch.equal(value, state[key]) for key, value in optimizer.state[parameter].items())
    take(optimizer, parameter, first)
    assert not torch.equal(parameter, kept)


def test_a_first_step_that_is_left_out_is_as_if_it_had_not_been() -> None:
    ours, other, (gradient,) = a_parameter(), a_parameter(), gradients(1)
    optimizer, expected = optimizer_of(ours), optimizer_of(other)
    take(optimizer, ours, gradient * torch.nan)
    take(optimizer, ours, gradient)
    take(expected, other, gradient)
    assert torch.equal(ours, other)


def test_weights_without_any_gradient_stay() -> None:
    """Though their neighbours in the block move."""
    parameter, before = a_parameter(), a_parameter()
    optimizer = optimizer_of(parameter)
    for gradient in gradients(5):
        gradient[::2] = 0
        take(optimizer, parameter, gradient)
    assert torch.equal(parameter[::2], before[::2])
    assert (parameter[1::2] != before[1::2]).all()


def test_a_step_in_parts_is_the_step_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, other = a_parameter(), a_parameter()
    optimizer, expected = optimizer_of(ours), optimizer_of(other)
    for gradient in gradients(3):
        take(expected, other, gradient)
    monkeypatch.setattr(adam8bit, "weights_at_once", lambda device: 4096)
    for gradient in gradients(3):
        take(optimizer, ours, gradient)
    assert torch.equal(ours, other)


def test_a_transposed_parameter_learns_as_the_one_it_transposes() -> None:
    plain, turned = a_parameter((64, 64)), nn.Parameter(a_parameter((64, 64)).detach().t().contiguous().t())
    assert not turned.is_contiguous()
    for parameter in (plain, turned):
        optimizer = optimizer_of(parameter)
        for gradient in gradients(2, (64, 64)):
            take(optimizer, parameter, gradient)
    assert torch.equal(plain, turned)


def test_a_plan_counts_what_a_step_stores() -> None:
    """On tensors without values the same state, in number and size."""
    real = a_parameter()
    optimizer = optimizer_of(real)
    take(optimizer, real, gradients(1)[0])
    with FakeTensorMode():
        outline = nn.Parameter(torch.empty(300, 100))
        planned = optimizer_of(outline)
        outline.grad = torch.zeros_like(outline)
        step_if_finite(planned, torch.ones(()))
    assert state_bytes(planned) == state_bytes(optimizer)
    take(optimizer, real, gradients(1)[0])  # the plan has left no tensor without values behind


def run_whole(run_of: RunOf, *, seed: int = 0, **given: Any) -> Run:
    """Of a model that is trained whole, from weights and data of this seed: 45 steps of 8 rows."""
    network = run_of().state.network.requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1 and ".adapters." not in name:
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.02)
            parameter.requires_grad_(True)
    return run_of(network=network, learning_rate=3e-3, epochs=15, seed=seed, **given)


def narrow_states(run: Run) -> int:
    return sum(value.dtype == torch.uint8 for value in run.state.tensors().values())


@pytest.mark.slow
def test_the_training_curve_is_adamws_within_the_noise_of_seeds(run_of: RunOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step's loss differs by more than the standard deviation, over three seeds, of AdamW's last loss."""
    monkeypatch.setattr(adam8bit, "SMALLEST_NARROW", 256)
    curves: dict[str, list[list[float]]] = {"adamw": [], "adam8bit": []}
    for name, losses in curves.items():
        for seed in range(3):
            run = run_whole(run_of, seed=seed, optimizer=name)
            losses.append([train_step(run)["loss"] for _ in range(run.plan.num_steps)])
            assert (narrow_states(run) > 20) == (name == "adam8bit")
    wide, narrow = (torch.tensor(losses) for losses in curves.values())
    assert wide[:, -1].mean() < 0.8 * wide[:, 0].mean()
    assert (wide - narrow).abs().max() < wide[:, -5:].mean(1).std()


@pytest.mark.parametrize("stable_embedding", [True, False])
def test_a_run_goes_on_from_a_checkpoint_to_the_bit(
    run_of: RunOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stable_embedding: bool
) -> None:
    monkeypatch.setattr(adam8bit, "SMALLEST_NARROW", 256)
    chosen = {"optimizer": {"type": "adam8bit", "stable_embedding": stable_embedding}}
    whole, checkpoints = run_whole(run_of, **chosen), Checkpoints(tmp_path, keep_last=1, fingerprint="one")
    for step in range(6):
        train_step(whole)
        if step == 2:
            checkpoints.save(whole.state)
    resumed = run_whole(run_of, **chosen)
    found = checkpoints.latest()
    assert found is not None
    checkpoints.load(found, resumed.state)
    for _ in range(3):
        train_step(resumed)
    tensors, expected = resumed.state.tensors(), whole.state.tensors()
    assert narrow_states(resumed) > 20
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in tensors.items())
