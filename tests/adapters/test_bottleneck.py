"""Bottleneck adapters against their papers' equations, in plain PyTorch and float64, on several architectures."""

import re
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from luthier.adapters.bottleneck import Bottleneck as BottleneckAdapter
from luthier.adapters.inject import adapted_layers, adapter_parameters, inject
from luthier.adapters.peft_format import load_adapter, save_adapter
from luthier.errors import AdapterError
from luthier.models.recompute import checkpoint_layers
from luthier.models.trainable import freeze_base
from luthier.recipe.adapters import Bottleneck, LoRA

IDS = torch.arange(1, 25).view(2, 12)
PLACEMENTS = {
    "houlsby": Bottleneck(size=6),
    "pfeiffer": Bottleneck(size=6, after="feed_forward", activation="gelu"),
    "attention": Bottleneck(size=6, after="attention", activation="tanh"),
    "parallel": Bottleneck(size=6, parallel=True, scale=4.0, activation="silu"),
}
SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": torch.tanh,
}


def network() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def adapted(settings: Bottleneck, model: PreTrainedModel | None = None) -> PreTrainedModel:
    """As if trained: every parameter at random."""
    model = network() if model is None else model
    inject(model, settings, seed=3)
    for i, parameter in enumerate(adapter_parameters(model).values()):
        nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(i))
    return model


def by_the_papers(adapter: BottleneckAdapter, read: Tensor) -> Tensor:
    """s (U f(D read + d) + u)"""
    inner = read @ adapter.adapter_down.T + adapter.adapter_down_bias
    outer = FUNCTIONS[adapter.settings.activation](inner) @ adapter.adapter_up.T + adapter.adapter_up_bias
    return outer * adapter.settings.scale


def reference(model: PreTrainedModel, settings: Bottleneck) -> Tensor:
    """A Llama's logits, its blocks written out: h += y + bottleneck, for attention and feed-forward in turn."""
    body = model.model
    hidden = body.embed_tokens(IDS)
    positions = torch.arange(IDS.shape[1])[None]
    rotary = body.rotary_emb(hidden, positions)
    above = torch.full((IDS.shape[1], IDS.shape[1]), float("-inf"), dtype=hidden.dtype).triu(1)[None, None]
    for block in body.layers:
        for norm, layer, options in (
            (block.input_layernorm, block.self_attn, {"position_embeddings": rotary, "attention_mask": above}),
            (block.post_attention_layernorm, block.mlp, {}),
        ):
            x = norm(hidden)
            has = isinstance(getattr(layer, "adapters", None), nn.ModuleDict)
            result = (layer.base if has else layer)(x, **options)
            y = result[0] if isinstance(result, tuple) else result
            added = by_the_papers(layer.adapters["default"], x if settings.parallel else y) if has else 0.0
            hidden = hidden + y + added
    logits: Tensor = model.lm_head(body.norm(hidden))
    return logits


def gradients(model: PreTrainedModel, logits: Tensor) -> dict[str, Tensor]:
    """Of a loss that every logit takes part in."""
    found = torch.autograd.grad(logits.square().mean(), list(adapter_parameters(model).values()))
    return dict(zip(adapter_parameters(model), found, strict=True))


@pytest.mark.parametrize("name", PLACEMENTS)
def test_logits_and_gradients_are_those_of_the_papers_equations(name: str) -> None:
    """In float64, to 1e-10: only the order of sums differs."""
    settings, model = PLACEMENTS[name], adapted(PLACEMENTS[name]).double()
    expected, found = reference(model, settings), model(IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradients(model, found), gradients(model, expected), rtol=0, atol=1e-10)
    assert (found - network().double()(IDS).logits).abs().max() > 1e-2


@pytest.mark.parametrize("name", PLACEMENTS)
def test_float32_agrees_with_float64(name: str) -> None:
    model = adapted(PLACEMENTS[name])
    found = model(IDS).logits
    exact = deepcopy(model).double()
    torch.testing.assert_close(found.double(), exact(IDS).logits, rtol=1e-5, atol=1e-5)
    expected = gradients(exact, exact(IDS).logits)
    for key, gradient in gradients(model, found).items():
        torch.testing.assert_close(gradient.double(), expected[key], rtol=1e-4, atol=1e-5)


def test_it_sits_where_the_papers_put_it() -> None:
    blocks = [f"model.layers.{i}" for i in (0, 1)]
    attention, feed_forward = [f"{b}.self_attn" for b in blocks], [f"{b}.mlp" for b in blocks]
    assert list(adapted_layers(adapted(PLACEMENTS["pfeiffer"]))) == feed_forward
    assert list(adapted_layers(adapted(PLACEMENTS["attention"]))) == attention
    assert sorted(adapted_layers(adapted(PLACEMENTS["houlsby"]))) == sorted(attention + feed_forward)


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, num_attention_heads=4)),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    ),
    "falcon": lambda: FalconForCausalLM(
        FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    ),
}


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_finds_its_sublayers_in_other_architectures(architecture: str, parallel: bool) -> None:
    torch.manual_seed(0)
    model = ARCHITECTURES[architecture]().eval().requires_grad_(False)
    before = model(IDS).logits
    inject(model, Bottleneck(size=4, parallel=parallel), seed=0)
    assert len(adapted_layers(model)) == 4
    assert torch.equal(model(IDS).logits, before)
    for parameter in adapter_parameters(model).values():
        nn.init.normal_(parameter, std=0.2)
    model(IDS, labels=IDS).loss.backward()
    assert all(bool(p.grad.any()) for p in adapter_parameters(model).values())


def test_a_block_without_the_sublayer_is_refused_with_its_children() -> None:
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 97}
    model = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=32))
    sentence = (
        "model.decoder.layers.0: no child of it is known as its feed-forward sublayer, its children are self_attn,"
    )
    with pytest.raises(AdapterError, match=re.escape(sentence)):
        inject(model, Bottleneck(), seed=0)
    inject(model, Bottleneck(after="attention"), seed=0)
    assert list(adapted_layers(model)) == ["model.decoder.layers.0.self_attn"]


@pytest.mark.parametrize("name", PLACEMENTS)
def test_it_comes_back_from_its_files_bit_for_bit(name: str, tmp_path: Path) -> None:
    first, second = adapted(PLACEMENTS[name]), network()
    save_adapter(first, tmp_path, base_model="base")
    assert load_adapter(second, tmp_path) == PLACEMENTS[name]
    assert adapter_parameters(second).keys() == adapter_parameters(first).keys()
    assert torch.equal(second(IDS).logits, first(IDS).logits)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_recomputing_layers_leaves_gradients_as_they_are(name: str) -> None:
    """With dropout too, whose draws are repeated."""
    found = []
    for every in (0, 1):
        model = adapted(PLACEMENTS[name].model_copy(update={"dropout": 0.5})).train()
        checkpoint_layers(model, every)
        torch.manual_seed(7)
        found.append(gradients(model, model(IDS, use_cache=False).logits))
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_a_bfloat16_model_with_float32_parameters_gets_float32_gradients() -> None:
    model = network().bfloat16()
    adapted(PLACEMENTS["houlsby"], model)
    logits = model(IDS).logits
    assert logits.dtype == torch.bfloat16
    assert {g.dtype for g in gradients(model, logits.float()).values()} == {torch.float32}


@pytest.mark.parametrize("name", PLACEMENTS)
def test_it_runs_without_values(name: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = network()
        freeze_base(model)
        inject(model, PLACEMENTS[name], seed=0)
        model(IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None for p in adapter_parameters(model).values())


def test_it_stands_around_adapters_of_linear_layers() -> None:
    """The inner layer's update reaches the logits through the bottleneck, and both can be taken off alone."""
    model = adapted(PLACEMENTS["houlsby"])
    before = model(IDS).logits
    inject(model, LoRA(r=2, target_modules=("o_proj", "down_proj")), seed=1, name="second")
    assert torch.equal(model(IDS).logits, before)
    for name, parameter in adapter_parameters(model).items():
        if ".second." in name:
            nn.init.normal_(parameter, std=0.2)
    assert not torch.equal(model(IDS).logits, before)


def test_the_rest_of_what_attention_returns_passes_through() -> None:
    model = adapted(PLACEMENTS["houlsby"])
    model.set_attn_implementation("eager")
    weights = model(IDS, output_attentions=True).attentions
    assert [tuple(w.shape) for w in weights] == [(2, 4, 12, 12)] * 2


def test_a_call_without_hidden_states_is_refused() -> None:
    model = adapted(PLACEMENTS["parallel"])
    call: Callable[..., Any] = partial(model.model.layers[0].mlp.adapters["default"], base=lambda **_: torch.zeros(1))
    with pytest.raises(AdapterError, match=r"layers\.0\.mlp: is called without hidden states"):
        call(states=torch.zeros(1))
