"""LoKr says what PEFT's LoKr says, and their files are each other's."""

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from peft.tuners.lokr.layer import factorization as pefts_factorization
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.adapters.inject import adapter_parameters, inject
from luthier.adapters.lokr import factorization
from luthier.adapters.peft_format import load_adapter, save_adapter
from luthier.recipe.adapters import LoKr

IDS = torch.arange(1, 25).view(2, 12)


def network() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.parametrize(
    "settings",
    [
        LoKr(r=2, alpha=3),
        LoKr(r=99),
        LoKr(r=1, alpha=1, decompose_both=True, decompose_factor=5, target_modules=("v_proj", "down_proj")),
        LoKr(r=2, decompose_factor=8, rank_pattern={"up_proj": 1}, alpha_pattern={"v_proj": 5}),
        LoKr(r=2, layers_to_transform=(1,)),
    ],
    ids=["thin", "whole", "both thin", "patterns", "one block"],
)
def test_peft_loads_our_file_and_gives_the_same_logits_and_gradients(
    settings: LoKr, same_as_pefts: Callable[..., None], tmp_path: Path
) -> None:
    mine = network()
    inject(mine, settings, seed=0)
    for i, parameter in enumerate(adapter_parameters(mine).values()):
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(i))
    save_adapter(mine, tmp_path, base_model="base")
    theirs = peft.PeftModel.from_pretrained(network(), tmp_path, is_trainable=True).eval()
    same_as_pefts(mine, theirs)


@pytest.mark.parametrize("decompose_both", [False, True])
def test_we_load_pefts_file_and_give_the_same_logits(decompose_both: bool, tmp_path: Path) -> None:
    config = peft.LoKrConfig(
        r=2,
        alpha=3,
        target_modules=["q_proj", "down_proj"],
        decompose_both=decompose_both,
        decompose_factor=8,
        init_weights=False,
    )
    theirs = peft.get_peft_model(network(), config).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)  # else it looks for the base model on a hub
    mine = network()
    settings = load_adapter(mine, tmp_path)
    assert (settings.type, settings.r, settings.decompose_both) == ("lokr", 2, decompose_both)
    torch.testing.assert_close(mine(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("decompose_both", [False, True])
def test_start_values_have_pefts_distribution(decompose_both: bool) -> None:
    """Deviation and bounds within 20%, from 56 draws or more; C, or its first factor, is zero in both."""
    chosen = {"r": 2, "alpha": 2, "decompose_both": decompose_both, "decompose_factor": 8}
    theirs = peft.get_peft_model(network(), peft.LoKrConfig(**chosen, target_modules="all-linear"))
    mine = network()
    inject(mine, LoKr(**chosen), seed=0)
    for word in ("w1_a", "w1_b", "w2_a", "w2_b") if decompose_both else ("w1", "w2_a", "w2_b"):
        ours = torch.cat([p.detach().flatten() for n, p in adapter_parameters(mine).items() if n.endswith(word)])
        peers = torch.cat([p.detach().flatten() for n, p in theirs.named_parameters() if f".lokr_{word}." in n])
        assert len(ours) == len(peers) >= 56
        assert float(ours.std()) == pytest.approx(float(peers.std()), rel=0.2)
        assert float(ours.abs().max()) == pytest.approx(float(peers.abs().max()), rel=0.2)


@given(st.integers(1, 3000), st.just(-1) | st.integers(1, 300))
@example(576, -1)
@example(16, 8)
@example(127, 12)
def test_sizes_are_factored_as_peft_does(size: int, largest: int) -> None:
    first, second = factorization(size, largest)
    assert first * second == size
    assert (first, second) == pefts_factorization(size, largest)
