"""An adapter merges into a weight that lies on another device than it does."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.adapters.inject import adapted_layers, inject
from luthier.recipe.adapters import ADAPTER_SETTINGS


@pytest.mark.parametrize("kind", ["adalora", "dylora", "ia3", "loha", "lokr", "lora", "vera"])
def test_what_is_merged_lies_where_the_weight_lay(kind: str) -> None:
    """The device "meta" stands for the other, as where a model is merged a layer at a time."""
    sizes = {"vocab_size": 7, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=1, attention_bias=True, mlp_bias=True)
    model = LlamaForCausalLM(config).requires_grad_(False)
    inject(model, ADAPTER_SETTINGS[kind](), seed=0)
    for layer in adapted_layers(model).values():
        given = (layer.base.weight.to("meta"), layer.base.bias.to("meta"))
        merged = layer.adapters["default"].merge(*given)
        assert [(t.device.type, t.shape) for t in merged] == [("meta", t.shape) for t in given]
