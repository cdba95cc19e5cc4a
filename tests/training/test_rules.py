"""Each rule is its library's optimizer, or its paper's formula, step by step on the same gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import Adafactor

from luthier.training.optimizers import OPTIMIZERS, Optimizer, step_if_finite

RATE, DECAY = 1e-2, 0.1
ADAM = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}
FACTORS = {"decay_exponent": 0.8, "clip": 1.0, "epsilon": 1e-30}
SHAPES = [(40, 30), (30, 40), (33,)]


def steps(word: str, shape: tuple[int, ...], peer: Callable[[nn.Parameter], torch.optim.Optimizer], **numbers: float):
    """Twenty of the rule, and of the peer on a parameter of its own; both parameters and optimizers."""
    draw = torch.Generator().manual_seed(0)
    ours = nn.Parameter(torch.randn(shape, generator=draw) * 0.1)
    other = nn.Parameter(ours.detach().clone())
    rule = {"rule": OPTIMIZERS[word], "lr": RATE, "weight_decay": DECAY, "wide": False}
    optimizer, expected = Optimizer([{"params": [ours], **rule, **numbers}]), peer(other)
    for _ in range(20):
        gradient = torch.randn(shape, generator=draw) * torch.rand(shape, generator=draw)
        ours.grad, other.grad = gradient.clone(), gradient
        step_if_finite(optimizer, gradient.norm())
        expected.step()
    return ours, other, optimizer, expected


@pytest.mark.parametrize("shape", SHAPES)
def test_adamw_is_pytorchs_fused_one_to_the_bit(shape: tuple[int, ...]) -> None:
    def peer(p: nn.Parameter) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p], lr=RATE, weight_decay=DECAY, fused=True)

    ours, other, optimizer, expected = steps("adamw", shape, peer, **ADAM)
    assert torch.equal(ours, other)
    assert all(torch.equal(value, expected.state[other][name]) for name, value in optimizer.state[ours].items())


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_muon_is_pytorchs_to_the_bit(shape: tuple[int, ...]) -> None:
    def peer(p: nn.Parameter) -> torch.optim.Optimizer:
        return torch.optim.Muon([p], lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")

    ours, other, _, _ = steps("muon", shape, peer, momentum=0.95)
    assert torch.equal(ours, other)


def test_muon_takes_several_matrices_in_one_parameter_each_by_itself() -> None:
    """As those of experts are, [experts, out, in]."""
    rule = {"rule": OPTIMIZERS["muon"], "lr": RATE, "weight_decay": DECAY, "momentum": 0.95}
    draw = torch.Generator().manual_seed(0)
    together = nn.Parameter(torch.randn(3, 8, 5, generator=draw))
    apart = [nn.Parameter(one.detach().clone()) for one in together]
    together.grad = torch.randn(3, 8, 5, generator=draw)
    for parameter, gradient in zip(apart, together.grad, strict=True):
        parameter.grad = gradient.clone()
    Optimizer([{"params": [together], **rule}]).step()
    Optimizer([{"params": apart, **rule}]).step()
    assert torch.equal(together, torch.stack([one.detach() for one in apart]))


@pytest.mark.parametrize("shape", SHAPES)
def test_adafactor_scaled_by_parameters_is_pytorchs(shape: tuple[int, ...]) -> None:
    """To the rounding of weights of up to 0.5 over twenty steps. PyTorch's bounds the mean of squares at 1e-7 from
    below, which these gradients lie over.
    """

    def peer(p: nn.Parameter) -> torch.optim.Optimizer:
        return torch.optim.Adafactor([p], lr=RATE, weight_decay=DECAY)

    ours, other, _, _ = steps("adafactor", shape, peer, scale_parameter=True, **FACTORS)
    torch.testing.assert_close(ours, other, rtol=0, atol=20 * 2**-25)


@pytest.mark.parametrize("shape", SHAPES)
def test_adafactor_is_transformers(shape: tuple[int, ...]) -> None:
    def peer(p: nn.Parameter) -> torch.optim.Optimizer:
        return Adafactor([p], lr=RATE, weight_decay=DECAY, scale_parameter=False, relative_step=False)

    ours, other, _, _ = steps("adafactor", shape, peer, scale_parameter=False, **FACTORS)
    torch.testing.assert_close(ours, other, rtol=0, atol=20 * 2**-25)


@pytest.mark.parametrize("shape", SHAPES)
def test_schedule_free_is_its_authors(shape: tuple[int, ...]) -> None:
    """The weights that gradients are taken at, and their average."""
    library = pytest.importorskip("schedulefree", reason="schedulefree is not installed: nothing to compare with")

    def peer(p: nn.Parameter) -> torch.optim.Optimizer:
        optimizer = library.AdamWScheduleFree([p], lr=RATE, weight_decay=DECAY)
        optimizer.train()
        return optimizer

    ours, other, optimizer, expected = steps("schedule_free", shape, peer, **ADAM)
    trained_at = ours.detach().clone()
    torch.testing.assert_close(ours, other, rtol=0, atol=20 * 2**-25)
    optimizer.eval()
    expected.eval()
    torch.testing.assert_close(ours, other, rtol=0, atol=20 * 2**-25)
    assert (ours - trained_at).abs().max() > RATE / 10


@pytest.mark.parametrize("shape", SHAPES)
def test_lion_is_the_papers_formula_in_float64(shape: tuple[int, ...]) -> None:
    class Formula(torch.optim.Optimizer):
        """Chen et al. 2023, algorithm 2."""

        def step(self) -> None:
            for p in self.param_groups[0]["params"]:
                state = self.state[p]
                weight, mean = state.get("w", p.detach().double()), state.get("m", torch.zeros_like(p).double())
                state["w"] = weight - RATE * ((0.9 * mean + (1 - 0.9) * p.grad).sign() + DECAY * weight)
                state["m"] = 0.99 * mean + (1 - 0.99) * p.grad
                p.data.copy_(state["w"])

    ours, other, _, _ = steps("lion", shape, lambda p: Formula([p], {}), beta1=0.9, beta2=0.99)
    torch.testing.assert_close(ours, other, rtol=0, atol=20 * 2**-25)


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (32, 32)])
def test_muons_steps_are_as_large_as_adamws(shape: tuple[int, int]) -> None:
    """A root mean square of 0.2 rate, as AdamW's usual ones (Liu et al. 2025, section 2.2); singular values that lie
    between 0.68 and 1.2 leave it within as much.
    """
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    numbers = {"lr": RATE, "weight_decay": 0.0, "momentum": 0.95}
    Optimizer([{"params": [weight], "rule": OPTIMIZERS["muon"], **numbers}]).step()
    assert 0.68 < float(weight.detach().square().mean().sqrt()) / (0.2 * RATE) < 1.2


def state_bytes(word: str, weight: Tensor) -> int:
    parameter = nn.Parameter(weight)
    numbers = {"lr": RATE, "weight_decay": 0.0, "wide": False, "momentum": 0.95, "scale_parameter": False}
    optimizer = Optimizer([{"params": [parameter], "rule": OPTIMIZERS[word], **ADAM, **FACTORS, **numbers}])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return sum(value.nbytes for value in optimizer.state[parameter].values())


@pytest.mark.parametrize(
    ("word", "expected"),
    [("adamw", 8), ("adam8bit", 2), ("adafactor", 0), ("lion", 4), ("muon", 4), ("schedule_free", 8)],
)
def test_the_state_takes_as_many_bytes_a_parameter_as_the_documents_say(word: str, expected: int) -> None:
    """Besides two counts, the scales of 2,048 values in 8 bits and Adafactor's rows and columns."""
    size = 512
    scales = 2 * 4 * size * size // 2048 if word == "adam8bit" else 0
    factors = 2 * 4 * size if word == "adafactor" else 0
    assert 0 <= state_bytes(word, torch.ones(size, size)) - expected * size * size - scales - factors <= 8
