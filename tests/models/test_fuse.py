"""A fused network is the plain network: same outputs, gradients and names; what is not proven equal stays."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.models.fuse import fuse

Factory = Callable[..., PreTrainedModel]

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
ARCHITECTURES = ["llama", "qwen3", "mistral", "gemma3_text"]
IDS = torch.arange(1, 25).view(2, 12)


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    model.zero_grad()
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fused_network_has_the_plain_ones_outputs_and_gradients(network: Factory, architecture: str) -> None:
    """To 1e-5 of the largest: float32 sums of other order."""
    plain = network(architecture, **SIZES)
    fused = deepcopy(plain)
    fusion = fuse(fused)
    assert fusion.fused.total() > 0
    assert not fusion.kept
    torch.testing.assert_close(fused(IDS).logits, plain(IDS).logits, rtol=0, atol=1e-5)
    ours, expected = gradients(fused), gradients(plain)
    assert ours.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_norm_gate_and_linear_layer_is_fused_and_nothing_else(network: Factory, architecture: str) -> None:
    """Two layers, each with a gated feed-forward block and its norms, and the final norm."""
    model = network(architecture, **SIZES)
    norms = sum(type(m).__name__.endswith("RMSNorm") for m in model.modules())
    gates = sum(type(m).__name__.endswith("MLP") for m in model.modules())
    linears = sum(type(m) is nn.Linear for m in model.modules())
    assert fuse(model).fused.total() == norms + gates + linears
    assert gates == 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_parameters_and_modes_stay_as_they_are(network: Factory, architecture: str) -> None:
    model = network(architecture, **SIZES)
    names, parameters = list(model.state_dict()), {id(p) for p in model.parameters()}
    fuse(model)
    assert list(model.state_dict()) == names
    assert {id(p) for p in model.parameters()} == parameters
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_a_float64_network_is_fused_as_well(network: Factory, architecture: str) -> None:
    """To 1e-5: transformers' own norms round to float32 on their way, ours do not."""
    plain = network(architecture, **SIZES).double()
    fused = deepcopy(plain)
    assert not fuse(fused).kept
    torch.testing.assert_close(fused(IDS).logits, plain(IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_bfloat16_network_is_fused_as_well(network: Factory, architecture: str) -> None:
    """Three roundings to 8 bits in each of two layers: 5% of the largest logit."""
    plain = network(architecture, **SIZES).bfloat16()
    fused = deepcopy(plain)
    assert not fuse(fused).kept
    expected = plain(IDS).logits
    torch.testing.assert_close(fused(IDS).logits, expected, rtol=0, atol=0.05 * float(expected.detach().abs().max()))


class Centred(nn.Module):
    """Takes the mean away first, as no RMS norm does."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.eps = weight, 1e-6

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


class OutsideEps(Centred):
    """Adds eps outside the root: nearly equal for usual inputs, half as large for tiny ones."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)


class Bounded(Centred):
    """Bounds its input, far above what is usual."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clamp(-50, 50)
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


@pytest.mark.parametrize("kind", [Centred, OutsideEps, Bounded])
def test_a_norm_that_differs_is_left_alone_and_reported(network: Factory, kind: type[Centred]) -> None:
    model = network("llama", **SIZES)
    other = type("OtherRMSNorm", (kind,), {})(model.model.norm.weight)
    model.model.norm = other
    fusion = fuse(model)
    assert model.model.norm is other
    assert fusion.kept == {"OtherRMSNorm": 1}


def test_a_feed_forward_block_that_differs_is_left_alone_and_reported(network: Factory) -> None:
    """A feed-forward block that halves its output."""
    model = network("llama", **SIZES)
    block = model.model.layers[0].mlp
    halved = type("HalvedMLP", (type(block),), {"forward": lambda self, x: super(type(self), self).forward(x) / 2})
    block.__class__ = halved
    fusion = fuse(model)
    assert model.model.layers[0].mlp is block
    assert fusion.kept == {"HalvedMLP": 1}


def test_a_block_of_another_width_than_the_model_is_fused_too(network: Factory) -> None:
    """As behind a projection: its input is its own, not the embedding's."""
    model = network("llama", **SIZES)
    narrow = network("llama", **(SIZES | {"hidden_size": 16})).model.layers[0].mlp
    model.beside = narrow
    fuse(model)
    assert type(model.beside).__name__ == "FusedGatedMLP"


def test_fusing_twice_is_fusing_once(network: Factory) -> None:
    model = network("qwen3", **SIZES)
    fuse(model)
    once = model(IDS).logits
    fuse(model)
    assert torch.equal(model(IDS).logits, once)
