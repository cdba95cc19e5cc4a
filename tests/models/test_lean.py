"""A step without the network's modules gives the logits of a step with them, for all that it says it can do."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.adapters.inject import adapter_parameters, inject
from luthier.adapters.merge import adapters_merged
from luthier.adapters.switch import activate, assign_rows, mix_adapters
from luthier.kernels.decoding import Decoding, OwnKeys
from luthier.kernels.rotary import rotated
from luthier.models.attention import ATTENTION, register_attention
from luthier.models.decode import next_logits, read_prompts
from luthier.models.fuse import fuse
from luthier.models.lean import PLAIN, Lean, can_be_lean
from luthier.models.quantize import quantize_base
from luthier.recipe.adapters import IA3, AnyAdapter, DoRA, LoRA, VeRA

pytestmark = pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="no FBGEMM here")

Factory = Callable[..., PreTrainedModel]
Step = Callable[[Tensor, Decoding], Tensor]

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "pad_token_id": 0}


@pytest.fixture
def tiny(network: Factory) -> Factory:
    def built(name: str = "llama", **settings: Any) -> PreTrainedModel:
        """Weights that float16 holds exactly, so large that attention is sharp."""
        register_attention()
        model = network(name, **(SIZES | settings)).requires_grad_(False)
        for parameter in model.parameters():
            parameter.copy_((3 * parameter).half())
        model.set_attn_implementation(ATTENTION)
        return model

    return built


def adapted(model: PreTrainedModel, settings: AnyAdapter, name: str = "default") -> PreTrainedModel:
    inject(model, settings, seed=3, name=name)
    for path, parameter in adapter_parameters(model).items():
        if f".adapters.{name}." in path:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(path)))
    return model.requires_grad_(False)


@torch.inference_mode()
def two_steps(model: PreTrainedModel, step: Step) -> Tensor:
    """Of two prompts, the first with two answers of which one is a token longer."""
    prompts = [np.arange(3, 9, dtype=np.int32), np.arange(40, 43, dtype=np.int32)]
    keys, _ = read_prompts(model, prompts)
    own, groups = OwnKeys(3, 3), [(slice(0, 2), keys.of(0)), (slice(2, 3), keys.of(1))]
    found = []
    for number, new in enumerate(([5, 6, 7], [8, 9, 10])):
        positions = torch.tensor([6, 6, 3]) + number
        found.append(step(torch.tensor(new), Decoding.of(own, [number] * 3, groups, positions, model.dtype)))
    return torch.stack(found)


def by_modules(model: PreTrainedModel) -> Tensor:
    return two_steps(model, lambda tokens, decoding: next_logits(model, tokens, decoding))


def leanly(model: PreTrainedModel, form: str = "fp16", lean: Lean | None = None) -> Tensor:
    lean = lean or Lean(model, form)
    lean.refresh()
    return two_steps(model, lean.next_logits)


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """To what float32 sums of another order differ by, of the largest."""
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("name", sorted(PLAIN))
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_it_equals_the_modules_of_every_plain_architecture(tiny: Factory, name: str, *, fused: bool) -> None:
    windows = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}
    model = tiny(name, **({} if name == "llama" else windows))
    if fused:
        fuse(model)
    assert can_be_lean(model, "fp16")
    near(leanly(model), by_modules(model))


def test_scaled_positions_and_tied_heads_are_the_networks_own(tiny: Factory) -> None:
    scaling = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    model = tiny(rope_parameters=scaling, tie_word_embeddings=True)
    near(leanly(model), by_modules(model))
    assert not torch.allclose(leanly(model), leanly(tiny(tie_word_embeddings=True)))


@pytest.mark.parametrize("targets", [["q_proj"], ["v_proj", "up_proj"], ["k_proj", "o_proj", "gate_proj", "down_proj"]])
def test_adapters_of_low_rank_apply_to_their_layers_alone(tiny: Factory, targets: list[str]) -> None:
    model = adapted(tiny(), LoRA(r=4, target_modules=targets))
    without = leanly(tiny())
    near(leanly(model), by_modules(model))
    assert not torch.allclose(leanly(model), without, atol=1e-2)
    activate(model)
    near(leanly(model), without)


def test_several_adapters_add_up_and_each_change_of_them_is_seen(tiny: Factory) -> None:
    model = adapted(adapted(tiny(), LoRA(r=4)), LoRA(r=2, target_modules=["v_proj"]), "other")
    lean = Lean(model, "fp16")
    near(leanly(model, lean=lean), by_modules(model))
    stored = dict(lean.products)
    for parameter in adapter_parameters(model).values():
        parameter.mul_(0.5)
    activate(model, "other")
    near(leanly(model, lean=lean), by_modules(model))
    assert lean.products == stored, "frozen weights are stored once"


def test_what_is_trained_or_written_into_is_stored_anew(tiny: Factory) -> None:
    model = tiny()
    lean = Lean(model, "fp16")
    leanly(model, lean=lean)
    layer = model.model.layers[0].mlp.down_proj
    layer.weight.mul_(0.5)
    near(leanly(model, lean=lean), by_modules(model))
    layer.weight.requires_grad_(True)
    layer.weight.data.mul_(0.5)  # which leaves no trace, as a fused optimizer does not
    near(leanly(model, lean=lean), by_modules(model))
    stored, kept = dict(lean.products), Lean(model, "fp16", fixed=True)
    leanly(model, lean=lean)
    assert {name for name in stored if lean.products[name] is not stored[name]} == {"0.down"}
    leanly(model, lean=kept)
    stored = dict(kept.products)
    leanly(model, lean=kept)
    assert kept.products == stored


def test_bfloat16_and_int8_are_as_near_as_their_numbers(tiny: Factory) -> None:
    model = adapted(tiny().to(torch.bfloat16), LoRA(r=4))
    near(leanly(model), by_modules(model), 0.03)
    model = tiny()
    near(leanly(model, "int8"), by_modules(model), 0.05)


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_a_quantized_base_is_what_it_computes(tiny: Factory, scheme: str) -> None:
    model = adapted(tiny(hidden_size=64, intermediate_size=128), LoRA(r=4))
    quantize_base(model, scheme)
    near(leanly(model), by_modules(model), 2e-3)  # its weights, dense, are no longer exact in float16


@pytest.mark.parametrize("settings", [DoRA(r=4), IA3(), VeRA(r=4), LoRA(r=4, modules_to_save=("embed_tokens",))])
def test_other_adapters_go_by_the_modules(tiny: Factory, settings: AnyAdapter) -> None:
    assert not can_be_lean(adapted(tiny(), settings), "fp16")


def test_what_it_cannot_do_goes_by_the_modules(tiny: Factory) -> None:
    model = adapted(tiny(), LoRA(r=4))
    assert can_be_lean(model, "fp16")
    assert not can_be_lean(model, "dense")
    assert not can_be_lean(tiny("gemma3_text"), "fp16")
    assert not can_be_lean(tiny(hidden_act="gelu"), "fp16")
    with assign_rows(model, ["default", None]):
        assert not can_be_lean(model, "fp16")
    with adapters_merged(model):
        assert not can_be_lean(model, "fp16")
    mix_adapters(model, {"default": 0.5})
    assert not can_be_lean(model, "fp16")


def test_rotation_is_the_definition() -> None:
    x, angles = torch.randn(5, 3, 8, dtype=torch.float64), torch.randn(5, 1, 4, dtype=torch.float64)
    turned = torch.view_as_complex(torch.stack(x.chunk(2, -1), -1)) * torch.exp(1j * angles)
    expected = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(rotated(x, angles.cos(), angles.sin()), expected)
