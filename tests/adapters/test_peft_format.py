"""Adapters travel between Luthier and PEFT without a change in what the model says."""

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.adapters.inject import adapted_layers, adapter_parameters, inject
from luthier.adapters.peft_format import load_adapter, read_adapter, save_adapter
from luthier.errors import AdapterError
from luthier.recipe import LoRA

IDS = torch.arange(12)[None]


def network(hidden: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def adapted(settings: LoRA) -> LlamaForCausalLM:
    model = network()
    inject(model, settings, seed=3)
    for i, parameter in enumerate(adapter_parameters(model).values()):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))
    return model


@pytest.mark.parametrize(
    "settings",
    [LoRA(r=4), LoRA(r=8, alpha=3, rs_scaling=True), LoRA(r=2, target_modules=("q_proj", "down_proj"))],
    ids=["all", "rank-stabilised", "some"],
)
def test_peft_loads_our_adapter_and_gives_the_same_logits(settings: LoRA, tmp_path: Path) -> None:
    ours = adapted(settings)
    save_adapter(ours, tmp_path, base_model="base")
    theirs = peft.PeftModel.from_pretrained(network(), tmp_path)
    torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rs_scaling", [False, True])
def test_we_load_an_adapter_of_pefts_and_give_the_same_logits(rs_scaling: bool, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=7, target_modules=["v_proj", "up_proj"], use_rslora=rs_scaling, init_lora_weights=False
    )
    theirs = peft.get_peft_model(network(), config).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)  # else it looks for the base model on a hub
    ours = network()
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)


def test_an_adapter_comes_back_bit_for_bit(tmp_path: Path) -> None:
    first, second = adapted(LoRA(r=4)), network()
    save_adapter(first, tmp_path, base_model="base")
    load_adapter(second, tmp_path)
    for name, parameter in adapter_parameters(first).items():
        assert torch.equal(parameter, adapter_parameters(second)[name])


def test_an_adapter_for_another_model_is_refused(tmp_path: Path) -> None:
    save_adapter(adapted(LoRA(r=4)), tmp_path, base_model="base")
    with pytest.raises(AdapterError, match="made for another model"):
        load_adapter(network(hidden=48), tmp_path)


def test_an_adapter_that_does_not_fit_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    save_adapter(adapted(LoRA(r=4)), tmp_path, base_model="base")
    other = network(hidden=48)
    with pytest.raises(AdapterError, match="made for another model"):
        load_adapter(other, tmp_path)
    assert not adapted_layers(other)


@pytest.mark.parametrize("base_sha256", [None, "0" * 64])
def test_an_adapter_says_what_it_was_trained_on_and_peft_still_reads_it(
    base_sha256: str | None, tmp_path: Path
) -> None:
    save_adapter(adapted(LoRA(r=4)), tmp_path, base_model="base", base_sha256=base_sha256)
    saved = read_adapter(tmp_path)
    assert (saved.base_model, saved.base_sha256) == ("base", base_sha256)
    assert peft.PeftModel.from_pretrained(network(), tmp_path).peft_config["default"].r == 4


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"target_modules": ".*_proj"}, "asks for target_modules as a pattern"),
        ({"exclude_modules": ["q_proj"], "lora_bias": True}, "asks for exclude_modules, lora_bias"),
        ({"init_lora_weights": "pissa"}, "asks for init_lora_weights: pissa"),
        ({"init_lora_weights": "olora", "lora_alpha": 1}, "asks for init_lora_weights: olora"),
        ({"trainable_token_indices": 5}, "trainable_token_indices is no list of numbers"),
        ({"luthier": "x"}, "luthier holds no settings"),
        ({"peft_type": "BOFT"}, "type BOFT cannot be read"),
        ({"r": 0}, "not the settings of a lora"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(
    asked: dict[str, object], complaint: str, tmp_path: Path
) -> None:
    save_adapter(adapted(LoRA(r=4)), tmp_path, base_model="base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | asked))
    with pytest.raises(AdapterError, match=complaint):
        load_adapter(network(), tmp_path)


def test_a_truncated_file_and_a_pickled_one_are_one_sentence_each(tmp_path: Path) -> None:
    save_adapter(adapted(LoRA(r=4)), tmp_path, base_model="base")
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(AdapterError, match="cut short"):
        load_adapter(network(), tmp_path)
    weights.unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(AdapterError, match="never loaded"):
        load_adapter(network(), tmp_path)
