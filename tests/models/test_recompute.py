"""What is recomputed gives the same gradients to the last bit, and keeps less; what was kept elsewhere does too."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from luthier.adapters.inject import inject
from luthier.errors import ModelError
from luthier.models.fuse import fuse
from luthier.models.recompute import Recomputed, checkpoint_layers
from luthier.recipe.adapters import LoRA
from luthier.training.footprint import LiveBytes
from luthier.training.offload import activations_on_host, host_copy

IDS = torch.arange(48).view(2, 24)


@pytest.fixture
def network() -> PreTrainedModel:
    """Fused, frozen, with a LoRA that drops some of its input."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3}
    made = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).requires_grad_(False)
    fuse(made)
    inject(made, LoRA(r=4, dropout=0.2), seed=0)
    for name, parameter in made.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    return made.train()


def gradients(network: PreTrainedModel) -> dict[str, Tensor]:
    network.zero_grad()
    torch.manual_seed(1)
    network(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def kept_bytes(network: PreTrainedModel) -> int:
    """What waits for the backward pass."""
    counter = LiveBytes()
    counter.ignore([*network.parameters(), *network.buffers()])
    with counter:
        loss = network(input_ids=IDS, labels=IDS).loss
    assert loss.requires_grad
    return counter.live


@pytest.mark.parametrize("what", [1, 2, "selective"])
def test_what_is_recomputed_gives_the_same_gradients_and_keeps_less(network: PreTrainedModel, what: Recomputed) -> None:
    plain, kept = gradients(network), kept_bytes(network)
    checkpoint_layers(network, what)
    found = gradients(network)
    assert len(found) == 3 * 7 * 2
    assert all(torch.equal(found[name], gradient) for name, gradient in plain.items())
    assert kept_bytes(network) < kept
    checkpoint_layers(network, 0)
    assert kept_bytes(network) == kept


def test_selective_forms_the_feed_forward_part_again_but_not_attention_nor_the_last_product(
    network: PreTrainedModel,
) -> None:
    counts = {"self_attn": 0, "mlp.up_proj": 0, "mlp.down_proj": 0}

    def count(part: str) -> Callable[..., None]:
        return lambda *_: counts.__setitem__(part, counts[part] + 1)

    for part in counts:
        network.get_submodule(f"model.layers.1.{part}").register_forward_hook(count(part))
    checkpoint_layers(network, "selective")
    gradients(network)
    assert counts == {"self_attn": 1, "mlp.up_proj": 2, "mlp.down_proj": 1}


def test_a_network_without_gated_layers_is_refused() -> None:
    plain = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ModelError, match="no gated feed-forward layers to recompute; set gradient_checkpointing: 1"):
        checkpoint_layers(plain, "selective")


def test_activations_that_lie_elsewhere_meanwhile_give_the_same_gradients(network: PreTrainedModel) -> None:
    """Where elsewhere is, is for the caller to say: here a copy beside. Parameters are never moved."""
    moved: list[Tensor] = []

    def aside(tensor: Tensor) -> Tensor:
        moved.append(tensor.clone())
        return moved[-1]

    plain = gradients(network)
    own = {parameter.data_ptr() for parameter in network.parameters()}
    network.zero_grad()
    torch.manual_seed(1)
    with activations_on_host(network, aside, smallest_bytes=1024):
        loss = network(input_ids=IDS, labels=IDS).loss
    for tensor in moved:
        assert tensor.nbytes >= 1024
    loss.backward()
    assert len(moved) > 3 * 5
    assert not own & {tensor.data_ptr() for tensor in moved}
    assert all(torch.equal(p.grad, plain[name]) for name, p in network.named_parameters() if p.grad is not None)


def test_what_is_on_the_host_stays_there() -> None:
    assert host_copy(torch.ones(3)) is None
