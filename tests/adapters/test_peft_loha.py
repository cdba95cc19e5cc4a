"""LoHa says what PEFT's LoHa says, and their files are each other's."""

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.adapters.inject import adapter_parameters, inject
from luthier.adapters.peft_format import load_adapter, save_adapter
from luthier.recipe.adapters import LoHa

IDS = torch.arange(1, 25).view(2, 12)


def network() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.parametrize(
    "settings",
    [
        LoHa(r=2, alpha=3),
        LoHa(r=8),
        LoHa(r=4, layers_to_transform=(1,)),
        LoHa(r=2, rank_pattern={"up_proj": 6}, alpha_pattern={"v_proj": 5}),
    ],
    ids=["thin", "dense", "one block", "patterns"],
)
def test_peft_loads_our_file_and_gives_the_same_logits_and_gradients(
    settings: LoHa, same_as_pefts: Callable[..., None], tmp_path: Path
) -> None:
    mine = network()
    inject(mine, settings, seed=0)
    for i, parameter in enumerate(adapter_parameters(mine).values()):
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(i))
    save_adapter(mine, tmp_path, base_model="base")
    theirs = peft.PeftModel.from_pretrained(network(), tmp_path, is_trainable=True).eval()
    same_as_pefts(mine, theirs)


def test_we_load_pefts_file_and_give_the_same_logits(tmp_path: Path) -> None:
    config = peft.LoHaConfig(r=4, alpha=3, target_modules=["q_proj", "down_proj"], init_weights=False)
    theirs = peft.get_peft_model(network(), config).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)  # else it looks for the base model on a hub
    mine = network()
    settings = load_adapter(mine, tmp_path)
    assert (settings.type, settings.r, settings.alpha) == ("loha", 4, 3)
    torch.testing.assert_close(mine(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-5)


def test_start_values_have_pefts_distribution() -> None:
    """Deviation within 10%, from 3,500 draws or more; B2 is zero in both."""
    theirs = peft.get_peft_model(network(), peft.LoHaConfig(r=8, alpha=8, target_modules="all-linear"))
    mine = network()
    inject(mine, LoHa(r=8), seed=0)
    for word in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"):
        ours = torch.cat([p.detach().flatten() for n, p in adapter_parameters(mine).items() if n.endswith(word)])
        peers = torch.cat([p.detach().flatten() for n, p in theirs.named_parameters() if f".{word}." in n])
        assert float(ours.std()) == pytest.approx(float(peers.std()), rel=0.1)
        assert float(ours.abs().max()) == pytest.approx(float(peers.abs().max()), rel=0.1)
