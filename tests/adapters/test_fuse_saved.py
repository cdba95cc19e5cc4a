"""Adapters fused from folder to folder do what their weighted sum does."""

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.adapters.dylora import set_rank
from luthier.adapters.fuse_saved import fuse_saved
from luthier.adapters.inject import adapted_layers, adapter_parameters, inject
from luthier.adapters.peft_format import load_adapter, save_adapter
from luthier.adapters.switch import mix_adapters
from luthier.errors import AdapterError
from luthier.recipe.adapters import AnyAdapter, DoRA, DyLoRA, LoRA

IDS = torch.arange(12)[None]


def network() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


def saved(folder: Path, settings: AnyAdapter, *, seed: int, base_sha256: str = "0" * 64) -> Path:
    model = network()
    inject(model, settings, seed=seed)
    for i, parameter in enumerate(adapter_parameters(model).values()):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(100 * seed + i))
    place = folder / f"{settings.type}-{seed}"
    save_adapter(model, place, base_model="base", base_sha256=base_sha256)
    return place


@torch.no_grad()
def merged_weights(*adapters: tuple[Path, float]) -> dict[str, Tensor]:
    """The weights with the adapters' updates in them, each by its share."""
    model = network()
    for i, (folder, _) in enumerate(adapters):
        load_adapter(model, folder, name=str(i))
    mix_adapters(model, {str(i): share for i, (_, share) in enumerate(adapters)})
    return {path: layer.merged()[0] for path, layer in adapted_layers(model).items()}


def test_the_exact_fusion_is_the_weighted_sum_of_the_updates(tmp_path: Path) -> None:
    """To 1e-5, for adapters of other ranks, scales, starts and layers."""
    first = saved(tmp_path, LoRA(r=4, alpha=3), seed=1)
    second = saved(tmp_path, LoRA(r=2, rs_scaling=True, init="pissa", target_modules=("q_proj", "up_proj")), seed=2)
    fuse_saved([first, second], tmp_path / "fused", method="concatenate", weights=[0.7, -0.2])
    expected = merged_weights((first, 0.7), (second, -0.2))
    for path, weight in merged_weights((tmp_path / "fused", 1.0)).items():
        torch.testing.assert_close(weight, expected[path], rtol=0, atol=1e-5, msg=path)


def test_peft_reads_a_fused_adapter(tmp_path: Path) -> None:
    folders = [saved(tmp_path, LoRA(r=4, alpha=3), seed=seed) for seed in (1, 2)]
    fuse_saved(folders, tmp_path / "fused", method="svd", r=3)
    ours = network()
    load_adapter(ours, tmp_path / "fused")
    theirs = peft.PeftModel.from_pretrained(network(), tmp_path / "fused")
    torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits, rtol=0, atol=1e-5)


def test_a_dylora_is_fused_at_the_rank_that_its_file_remembers(tmp_path: Path) -> None:
    model = network()
    load_adapter(model, saved(tmp_path, DyLoRA(r=4, alpha=3), seed=1))
    set_rank(model, 2)
    save_adapter(model, tmp_path / "chosen", base_model="base")
    settings = fuse_saved([tmp_path / "chosen"], tmp_path / "fused", method="concatenate")
    assert settings.r == 2
    expected = merged_weights((tmp_path / "chosen", 1.0))
    for path, weight in merged_weights((tmp_path / "fused", 1.0)).items():
        torch.testing.assert_close(weight, expected[path], rtol=0, atol=1e-5, msg=path)


def test_adapters_of_other_models_or_types_are_refused(tmp_path: Path) -> None:
    first, dora = saved(tmp_path, LoRA(r=4), seed=1), saved(tmp_path, DoRA(r=4), seed=2)
    with pytest.raises(AdapterError, match=r"holds .*magnitude_vector; only LoRA"):
        fuse_saved([first, dora], tmp_path / "fused", method="ties")
    other = saved(tmp_path, LoRA(r=4), seed=3, base_sha256="1" * 64)
    with pytest.raises(AdapterError, match="its base is not that of"):
        fuse_saved([first, other], tmp_path / "fused", method="ties")
    assert not (tmp_path / "fused").exists()
