"""DoRA, bias modes, modules trained whole and patterns: PEFT's numbers, after loading each other's files."""

from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.adapters.inject import adapter_parameters, inject
from luthier.adapters.peft_format import load_adapter, save_adapter
from luthier.recipe.adapters import AnyAdapter, DoRA, LoRA

IDS = torch.arange(1, 25).view(2, 12)
CASES: dict[str, AnyAdapter] = {
    "dora": DoRA(r=4, alpha=3),
    "dora rank-stabilised with biases": DoRA(
        r=4, rs_scaling=True, bias="lora_only", target_modules=("q_proj", "up_proj")
    ),
    "all biases": LoRA(r=4, bias="all", target_modules=("v_proj",)),
    "modules": LoRA(r=4, target_modules=("v_proj", "up_proj"), modules_to_save=("lm_head",)),
    "patterns": LoRA(
        r=4, target_modules=("v_proj", "up_proj"), rank_pattern={"v_proj": 2}, alpha_pattern={"up_proj": 3}
    ),
    "one layer": LoRA(r=4, target_modules=("v_proj",), layers_to_transform=(1,)),
}
each_case = pytest.mark.parametrize("case", CASES)


def network() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, attention_bias=True)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def adapted(settings: AnyAdapter) -> LlamaForCausalLM:
    model = network()
    inject(model, settings, seed=3)
    for i, parameter in enumerate(adapter_parameters(model).values()):
        with torch.no_grad():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    return model


def gradients(model: nn.Module) -> list[float]:
    """The norms of all gradients that are there, in order of size."""
    model(input_ids=IDS, labels=IDS).loss.backward()
    return sorted(float(p.grad.norm()) for p in model.parameters() if p.grad is not None)


@each_case
def test_peft_reads_our_file_with_our_logits_and_gradients(case: str, tmp_path: Path) -> None:
    """To 1e-5: float32 sums in another order."""
    ours = adapted(CASES[case])
    save_adapter(ours, tmp_path, base_model="base")
    theirs = peft.PeftModel.from_pretrained(network(), tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits, rtol=0, atol=1e-5)
    assert gradients(theirs) == pytest.approx(gradients(ours), rel=1e-4, abs=1e-5)


@each_case
def test_we_read_pefts_file_with_its_logits(case: str, tmp_path: Path) -> None:
    save_adapter(adapted(CASES[case]), tmp_path / "ours", base_model="base")
    theirs = peft.PeftModel.from_pretrained(network(), tmp_path / "ours").eval()
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours = network()
    load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-5)
