"""Under autocast, where layers give bfloat16 for float32 activations, adapters compute and learn as they do without."""

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.adapters.inject import adapter_parameters, inject
from luthier.models.attention import ATTENTION, register_attention
from luthier.recipe.adapters import ADAPTER_SETTINGS, Bottleneck, LoHa, LoKr

IDS = torch.arange(1, 25).view(2, 12)
SETTINGS = {
    **{kind: ADAPTER_SETTINGS[kind]() for kind in ("adalora", "dora", "dylora", "ia3", "loha", "lokr", "lora", "vera")},
    "bottleneck": Bottleneck(size=4),
    "bottleneck_parallel": Bottleneck(size=4, parallel=True),
    "loha_dense": LoHa(r=8),
    "loha_thin": LoHa(r=2),
    "lokr_of_thin_factors": LoKr(r=2, decompose_both=True),
    "prefix": ADAPTER_SETTINGS["prefix"](),
    "prompt": ADAPTER_SETTINGS["prompt"](),
}


def network() -> LlamaForCausalLM:
    """Frozen, in float32."""
    torch.manual_seed(0)
    register_attention()
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, attn_implementation=ATTENTION)
    return LlamaForCausalLM(config).requires_grad_(False)


def run(model: nn.Module, *, autocast: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and by parameter the gradients of a loss. As is usual, the backward pass runs outside."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = model(IDS, labels=IDS)
    parameters = adapter_parameters(model)
    grads = torch.autograd.grad(result.loss, list(parameters.values()))
    return result.logits.detach().float(), dict(zip(parameters, grads, strict=True))


@pytest.mark.parametrize("kind", SETTINGS)
def test_values_and_gradients_are_float32s_to_the_rounding_of_bfloat16(kind: str) -> None:
    """Two layers of ten products each round to 8 bits, 2^-8 each time: 5% of the largest."""
    model = network()
    inject(model, SETTINGS[kind], seed=0)
    for i, parameter in enumerate(adapter_parameters(model).values()):
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))
    expected, exact = run(model.eval(), autocast=False)
    found, grads = run(model, autocast=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * float(expected.abs().max()))
    largest = max(float(grad.abs().max()) for grad in exact.values())
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, exact[name], rtol=0, atol=0.05 * largest, msg=name)
