"""IA3 says what PEFT's IA3 says, and their files are each other's."""

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.adapters.inject import adapter_parameters, inject
from luthier.adapters.peft_format import load_adapter, read_adapter, save_adapter
from luthier.errors import AdapterError
from luthier.recipe.adapters import IA3

IDS = torch.arange(1, 25).view(2, 12)


def network() -> LlamaForCausalLM:
    """With biases in attention, which PEFT's IA3 scales too."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, attention_bias=True)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def ours(settings: IA3) -> LlamaForCausalLM:
    """As if trained."""
    model = network()
    inject(model, settings, seed=0)
    for i, parameter in enumerate(adapter_parameters(model).values()):
        torch.nn.init.normal_(parameter, mean=1, std=0.2, generator=torch.Generator().manual_seed(i))
    return model


@pytest.mark.parametrize(
    "settings",
    [
        IA3(),
        IA3(target_modules="all-linear"),
        IA3(target_modules=("q_proj",)),
        IA3(layers_to_transform=(1,)),
        IA3(target_modules=("layers.0.mlp.up_proj", "v_proj"), feedforward_modules=("mlp.up_proj",)),
    ],
    ids=["usual", "all", "attention alone", "one block", "dotted names"],
)
def test_peft_loads_our_file_and_gives_the_same_logits_and_gradients(
    settings: IA3, same_as_pefts: Callable[..., None], tmp_path: Path
) -> None:
    mine = ours(settings)
    save_adapter(mine, tmp_path, base_model="base")
    theirs = peft.PeftModel.from_pretrained(network(), tmp_path, is_trainable=True).eval()
    same_as_pefts(mine, theirs)


def test_we_load_pefts_file_and_give_the_same_logits(tmp_path: Path) -> None:
    config = peft.IA3Config(
        target_modules=["q_proj", "up_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    )
    theirs = peft.get_peft_model(network(), config).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)  # else it looks for the base model on a hub
    mine = network()
    settings = load_adapter(mine, tmp_path)
    assert (settings.type, settings.feedforward_modules) == ("ia3", ("down_proj",))
    torch.testing.assert_close(mine(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-5)


def test_pefts_start_is_ours() -> None:
    config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    theirs = peft.get_peft_model(network(), config)
    mine = network()
    inject(mine, IA3(target_modules=("k_proj", "down_proj")), seed=0)
    expected = [p for n, p in theirs.named_parameters() if ".ia3_l." in n]
    for parameter, peer in zip(adapter_parameters(mine).values(), expected, strict=True):
        assert torch.equal(parameter, peer)


@pytest.mark.parametrize("settings", [IA3(layers_to_transform=(1,)), IA3(target_modules="all-linear")])
def test_settings_come_back_from_the_file(settings: IA3, tmp_path: Path) -> None:
    save_adapter(ours(settings), tmp_path, base_model="base")
    assert read_adapter(tmp_path).settings.feedforward_modules == ("down_proj",)


def test_a_feed_forward_name_that_is_not_adapted_is_refused() -> None:
    settings = IA3(target_modules=("v_proj",), feedforward_modules=("down_proj",))
    with pytest.raises(AdapterError, match='no adapted layer is named "down_proj"; name some of v_proj'):
        inject(network(), settings, seed=0)
