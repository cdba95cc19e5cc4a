"""An adapter trained with a head: PEFT reads it, and merged it is the folder of a reward model."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from luthier.adapters.copies import ModuleCopy
from luthier.adapters.inject import adapted_layers, adapter_parameters, inject
from luthier.adapters.merge import merge_adapters
from luthier.adapters.peft_format import save_adapter
from luthier.data.batches import collate
from luthier.data.examples import Origin
from luthier.data.sequences import TokenSequence
from luthier.errors import AdapterError, ExportError, ModelError
from luthier.models.adapted import load_adapted
from luthier.models.certificate import certify
from luthier.models.heads import score_rewards, trains_head, with_head, with_trained_head
from luthier.models.load import Model, load, load_either
from luthier.models.merge import merge_into
from luthier.models.quantize import quantize_base, quantized_as
from luthier.models.rewards import load_reward
from luthier.models.save import save
from luthier.models.sources import resolve
from luthier.models.trainable import freeze_base
from luthier.recipe.adapters import AnyAdapter, DoRA, LoRA

Factory = Callable[..., PreTrainedModel]
Saved = Callable[..., Path]

IDS = torch.arange(1, 25).view(2, 12)
SHARDED = 20_000  # bytes a file, which cuts a tiny model into several


def trained(base: Path, settings: AnyAdapter | None = None, *, folder: str = "adapter") -> Path:
    """The folder of an adapter with a head on this model, as if trained."""
    model = with_head(load_either(str(base)), seed=0)
    inject(model.network, with_trained_head(settings or LoRA(r=4)), seed=3)
    for i, parameter in enumerate(adapter_parameters(model.network).values()):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))
    save_adapter(model.network, base.parent / folder, base_model="base")
    return base.parent / folder


def batch() -> list[TokenSequence]:
    none = np.zeros(12, dtype=np.bool_)
    return [TokenSequence(ids.astype(np.int32), none, Origin("ids", 1)) for ids in IDS.numpy()]


def reward_of(model: Model) -> Tensor:
    with torch.no_grad():
        return score_rewards(model, collate(batch()))


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def test_the_head_is_trained_wholly_and_the_base_not_at_all(base: Saved) -> None:
    model = with_head(load(str(base())), seed=0)
    settings = with_trained_head(LoRA(r=4))
    inject(model.network, settings, seed=3)
    freeze_base(model.network)
    score_rewards(model, collate(batch())).square().sum().backward()
    learning = {name for name, parameter in model.network.named_parameters() if parameter.grad is not None}
    assert learning == set(adapter_parameters(model.network))
    kinds = {path: type(layer.adapters["default"]) for path, layer in adapted_layers(model.network).items()}
    assert [path for path, kind in kinds.items() if kind is ModuleCopy] == ["score"]
    assert len(kinds) == 15
    assert trains_head(settings)
    assert with_trained_head(settings) is settings


@pytest.mark.parametrize("settings", [LoRA(r=4), DoRA(r=2, alpha=3, target_modules=("q_proj", "up_proj"))])
def test_peft_reads_our_adapter_over_its_own_classifier(settings: AnyAdapter, base: Saved) -> None:
    """To 1e-5: float32 sums in another order. And we read what PEFT writes of it."""
    place = base()
    adapter = trained(place, settings)
    expected = reward_of(load_reward(str(place), adapter=adapter))
    bare = AutoModelForSequenceClassification.from_pretrained(place, num_labels=1)
    theirs = peft.PeftModel.from_pretrained(bare, adapter).eval()
    assert isinstance(theirs, peft.PeftModelForSequenceClassification)
    for one, reward in zip(IDS, expected, strict=True):
        torch.testing.assert_close(theirs(input_ids=one[None]).logits[0, 0], reward, rtol=0, atol=1e-5)
    theirs.save_pretrained(place.parent / "theirs", save_embedding_layers=False)
    again = load_reward(str(place), adapter=place.parent / "theirs")
    torch.testing.assert_close(reward_of(again), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "tied", "shard", "stored", "wanted"),
    [
        ("llama", True, 10**9, "fp32", None),
        ("llama", False, SHARDED, "bf16", None),
        ("qwen2", True, SHARDED, "fp32", "bf16"),
        ("gemma3_text", True, SHARDED, "bf16", None),
        ("gpt_neox", False, 10**9, "fp32", None),
    ],
)
def test_streaming_equals_merging_in_memory_bit_for_bit(
    architecture: str, tied: bool, shard: int, stored: str, wanted: str | None, base: Saved, tmp_path: Path
) -> None:
    place = base(architecture, dtype=stored, shard=shard, tie_word_embeddings=tied)
    adapter = trained(place)
    model = load_reward(str(place), adapter=adapter, dtype="fp32" if wanted else stored)
    merge_adapters(model.network)
    whole = save(model, tmp_path / "whole", dtype=wanted)
    merged = merge_into(resolve(str(place)), adapter, tmp_path / "merged", dtype=wanted).folder
    ours, expected = tensors(merged), tensors(whole)
    assert {name: value.dtype for name, value in ours.items()} == {n: value.dtype for n, value in expected.items()}
    assert all(torch.equal(value, expected[name]) for name, value in ours.items())
    for file in whole.glob("*.json"):
        assert file.name.endswith("index.json") or file.read_bytes() == (merged / file.name).read_bytes()


def test_what_is_merged_gives_the_rewards_of_base_and_adapter_here_and_in_transformers(
    base: Saved, tmp_path: Path
) -> None:
    """To 1e-5: one product instead of two. A second adapter on the reward model is merged like any other."""
    place = base(shard=SHARDED)
    adapter = trained(place)
    expected = reward_of(load_reward(str(place), adapter=adapter))
    merged = merge_into(resolve(str(place)), adapter, tmp_path / "merged").folder
    theirs = AutoModelForSequenceClassification.from_pretrained(merged)
    torch.testing.assert_close(reward_of(load_reward(str(merged))), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs(IDS).logits[:, 0], expected, rtol=0, atol=1e-5)
    second = trained(merged, folder="second")
    expected = reward_of(load_reward(str(merged), adapter=second))
    twice = merge_into(resolve(str(merged)), second, tmp_path / "twice").folder
    torch.testing.assert_close(reward_of(load_reward(str(twice))), expected, rtol=0, atol=1e-5)


def test_over_a_quantized_base_the_head_stays_dense(base: Saved, tmp_path: Path) -> None:
    place = base()
    model = with_head(load(str(place)), seed=0)
    inject(model.network, with_trained_head(LoRA(r=4)), seed=3)
    assert quantize_base(model.network, "nf4") == 14
    save_adapter(model.network, tmp_path / "adapter", base_model="base", quantize_base=quantized_as(model.network))
    live = load_reward(str(place), adapter=tmp_path / "adapter")
    merged = load_reward(str(merge_into(resolve(str(place)), tmp_path / "adapter", tmp_path / "merged").folder))
    torch.testing.assert_close(reward_of(live), reward_of(model), rtol=0, atol=1e-6)
    torch.testing.assert_close(reward_of(merged), reward_of(model), rtol=0, atol=1e-5)


def test_the_certificate_of_a_merged_reward_model_compares_rewards(base: Saved, tmp_path: Path) -> None:
    place = base()
    adapter = trained(place)
    merged = merge_into(resolve(str(place)), adapter, tmp_path / "merged", verify=True)
    assert merged.certificate is not None
    assert merged.certificate.kl <= merged.certificate.kl_bound < merged.certificate.kl_of_base
    assert json.loads((merged.folder / "certificate.json").read_text())["greedy_agreement"] == 1
    other = merge_into(resolve(str(place)), trained(place, LoRA(r=2), folder="other"), tmp_path / "others").folder
    with pytest.raises(ExportError, match="is not base and adapter"):
        certify(place, adapter, other, rounded=False)


def test_an_adapter_with_a_head_gives_no_text_and_one_without_no_rewards(base: Saved, model: Model) -> None:
    place = base()
    with pytest.raises(AdapterError, match="was trained with a head, so it gives rewards and no text"):
        load_adapted(str(place), trained(place))
    causal = load(str(place))
    inject(causal.network, LoRA(r=4), seed=3)
    save_adapter(causal.network, place.parent / "causal", base_model="base")
    with pytest.raises(ModelError, match=r"gives no rewards and .*causal has no head; train a reward model"):
        load_reward(str(place), adapter=place.parent / "causal")
