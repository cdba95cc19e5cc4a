"""VeRA says what PEFT's VeRA says; their files are each other's, with the shared pair and without; it exists once."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.adapters.inject import adapted_layers, adapter_parameters, inject
from luthier.adapters.peft_format import load_adapter, save_adapter
from luthier.errors import AdapterError
from luthier.recipe.adapters import VeRA

IDS = torch.arange(1, 25).view(2, 12)
PAIR = ("base_model.vera_A", "base_model.vera_B")
pytestmark = pytest.mark.filterwarnings("ignore:Specified to not:UserWarning")  # PEFT would rather have the pair stored


def network() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def ours(settings: VeRA) -> LlamaForCausalLM:
    """As if trained."""
    model = network()
    inject(model, settings, seed=0)
    for i, parameter in enumerate(adapter_parameters(model).values()):
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(i))
    return model


def pefts(folder: Path, **chosen: Any) -> peft.PeftModel:
    """As if trained, and saved in the folder."""
    config = peft.VeraConfig(r=8, target_modules=["q_proj", "down_proj"], **chosen)
    model = peft.get_peft_model(network(), config).eval()
    for name, parameter in model.named_parameters():
        if "vera_lambda" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, save_embedding_layers=False)  # else it looks for the base model on a hub
    return model


def pairs(model: LlamaForCausalLM) -> list[Any]:
    return [layer.adapters["default"].projections for layer in adapted_layers(model).values()]


@pytest.mark.parametrize(
    "settings",
    [VeRA(r=8), VeRA(r=40, projection_seed=5), VeRA(r=4, save_projection=True), VeRA(r=4, layers_to_transform=(1,))],
    ids=["thin", "another seed", "stored", "one block"],
)
def test_peft_loads_our_file_and_gives_the_same_logits_and_gradients(
    settings: VeRA, same_as_pefts: Callable[..., None], tmp_path: Path
) -> None:
    mine = ours(settings)
    save_adapter(mine, tmp_path, base_model="base")
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert (set(PAIR) <= stored.keys()) == settings.save_projection
    theirs = peft.PeftModel.from_pretrained(network(), tmp_path, is_trainable=True).eval()
    same_as_pefts(mine, theirs)


@pytest.mark.parametrize("save_projection", [True, False])
def test_we_load_pefts_file_and_give_the_same_logits(save_projection: bool, tmp_path: Path) -> None:
    theirs = pefts(tmp_path, save_projection=save_projection, projection_prng_key=7, vera_dropout=0.1)
    mine = network()
    settings = load_adapter(mine, tmp_path)
    assert settings == VeRA(
        r=8,
        target_modules=settings.target_modules,
        dropout=0.1,
        projection_seed=7,
        save_projection=save_projection,
    )
    torch.testing.assert_close(mine(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-5)


def test_the_pair_is_drawn_bit_for_bit_as_peft_draws_it(tmp_path: Path) -> None:
    theirs = pefts(tmp_path, projection_prng_key=11)
    mine = ours(VeRA(r=8, target_modules=("q_proj", "down_proj"), projection_seed=11))
    for own, peer in zip(pairs(mine)[0].pair, (theirs.vera_A, theirs.vera_B), strict=True):
        assert torch.equal(own, peer["default"])


def test_a_stored_pair_counts_and_stays_in_the_file(tmp_path: Path) -> None:
    """Another pair than the seed makes: of a platform that draws otherwise, say."""
    pefts(tmp_path / "theirs")
    weights = tmp_path / "theirs" / "adapter_model.safetensors"
    changed = {key: value + 1 if key in PAIR else value for key, value in load_file(weights).items()}
    save_file(changed, weights, {"format": "pt"})
    model = network()
    load_adapter(model, tmp_path / "theirs")
    save_adapter(model, tmp_path / "again", base_model="base")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == changed.keys()
    assert all(torch.equal(value, changed[key]) for key, value in again.items())


def test_a_pair_that_is_missing_or_does_not_fit_is_refused(tmp_path: Path) -> None:
    pefts(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, PAIR[0]: torch.zeros(8, 33)}, weights)
    with pytest.raises(AdapterError, match=r"made for another model: base_model.vera_A is \(8, 33\), here \(8, 48\)"):
        load_adapter(network(), tmp_path)
    save_file({key: value for key, value in tensors.items() if key not in PAIR}, weights)
    with pytest.raises(AdapterError, match=r"holds no base_model.vera_A; save the adapter again"):
        load_adapter(network(), tmp_path)


def test_the_pair_exists_once_however_many_layers() -> None:
    model = ours(VeRA(r=8))
    assert len(pairs(model)) == 14
    assert len(set(pairs(model))) == 1
    assert not any("vera_A" in name or value.numel() >= 8 * 32 for name, value in adapter_parameters(model).items())
    assert not any(adapter for layer in adapted_layers(model).values() for adapter in layer.adapters.buffers())


def test_moving_or_copying_the_network_leaves_one_pair() -> None:
    """Moved to another type it stays as it is, to another device it follows the first forward pass."""
    model = ours(VeRA(r=8))
    before = pairs(model)[0].pair
    copied = deepcopy(model).double()
    copied(IDS)
    assert len(set(pairs(copied))) == 1
    assert [t.dtype for t in pairs(copied)[0].pair] == [torch.float32] * 2
    for layer in adapted_layers(model.to("meta")).values():
        layer(torch.empty(3, layer.in_features, device="meta"))
    assert len(set(pairs(model))) == 1
    after = pairs(model)[0].pair
    assert [(t.device.type, t.shape) for t in after] == [("meta", t.shape) for t in before]


def test_a_pair_that_was_moved_while_generating_can_be_trained_with() -> None:
    """Generating runs in inference mode, whose tensors no backward pass may use; "meta" stands for a device."""
    model = ours(VeRA(r=8)).to("meta")
    layer = next(iter(adapted_layers(model).values()))
    with torch.inference_mode():
        layer(torch.empty(3, layer.in_features, device="meta"))
    layer(torch.empty(3, layer.in_features, device="meta")).sum().backward()
    assert layer.adapters["default"].vera_lambda_b.grad is not None
