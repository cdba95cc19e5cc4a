"""Merging in memory loses nothing in silence."""

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.adapters.inject import adapted_layers, adapter_parameters, inject
from luthier.adapters.merge import adapters_merged, merge_adapters, refuse_new_bias
from luthier.adapters.switch import adapters_off
from luthier.errors import AdapterError
from luthier.recipe.adapters import Bottleneck, LoRA


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    inject(model.requires_grad_(False), LoRA(r=2), seed=0)
    for parameter in adapter_parameters(model).values():
        nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
def logits(network: nn.Module) -> Tensor:
    result: Tensor = network(torch.arange(20)[None]).logits
    return result


def test_an_adapter_that_is_off_is_not_lost_in_silence(network: nn.Module) -> None:
    before = logits(network)
    with adapters_off(network), pytest.raises(AdapterError, match=r'q_proj: the adapter "default" is switched off'):
        merge_adapters(network)
    assert torch.equal(logits(network), before)


def test_a_merge_that_stops_half_way_computes_what_it_did(network: nn.Module) -> None:
    """To 1e-5: the merged half has one product instead of two."""
    before, num_layers = logits(network), len(adapted_layers(network))
    spoiled = network.get_submodule("model.layers.1.self_attn.q_proj.adapters.default")
    good, spoiled.lora_A = spoiled.lora_A, nn.Parameter(torch.zeros(2, 3), requires_grad=False)
    with pytest.raises(RuntimeError, match="size of tensor"):
        merge_adapters(network)
    spoiled.lora_A = good
    assert 0 < len(adapted_layers(network)) < num_layers
    torch.testing.assert_close(logits(network), before, rtol=0, atol=1e-5)


def test_a_bias_that_the_architecture_lacks_is_refused() -> None:
    with pytest.raises(AdapterError, match="gives this layer a bias"):
        refuse_new_bias("model.layers.0.mlp.up_proj", None, torch.zeros(3))
    refuse_new_bias("model.layers.0.mlp.up_proj", torch.zeros(3), torch.ones(3))
    refuse_new_bias("model.layers.0.mlp.up_proj", None, None)


def test_merged_for_a_while_the_weights_come_back_bit_for_bit(network: nn.Module) -> None:
    """To 1e-5 while merged: one product instead of two."""
    before, weights = logits(network), {name: value.clone() for name, value in network.state_dict().items()}
    with adapters_merged(network):
        torch.testing.assert_close(logits(network), before, rtol=0, atol=1e-5)
        assert not any(layer.active for layer in adapted_layers(network).values())
    assert torch.equal(logits(network), before)
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())


def test_what_cannot_be_merged_goes_on_applying_while_the_rest_is_merged(network: nn.Module) -> None:
    inject(network, Bottleneck(size=4), seed=1, name="second")
    for parameter in adapter_parameters(network).values():
        nn.init.normal_(parameter, std=0.2)
    before = logits(network)
    with adapters_merged(network):
        active = {
            type(layer.adapters[name]).__name__ for layer in adapted_layers(network).values() for name in layer.active
        }
        assert active == {"Bottleneck"}
        torch.testing.assert_close(logits(network), before, rtol=0, atol=1e-5)
    assert torch.equal(logits(network), before)
