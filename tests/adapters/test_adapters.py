"""The laws that every adapter keeps; a new member of ADAPTERS is tested by existing."""

import re
from collections.abc import Iterator
from contextlib import chdir
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from luthier.adapters.inject import ADAPTERS, adapted_layers, adapter_parameters, inject
from luthier.adapters.merge import merge_adapters, remove_adapters
from luthier.adapters.peft_format import save_adapter
from luthier.adapters.switch import adapters_off
from luthier.errors import AdapterError
from luthier.models.attention import ATTENTION, register_attention
from luthier.recipe.adapters import (
    ADAPTER_SETTINGS,
    IA3,
    AdaLoRA,
    AdapterFusion,
    AdapterSettings,
    Bottleneck,
    DoRA,
    DyLoRA,
    LoHa,
    LoKr,
    LoRA,
    Prefix,
    Prompt,
    VeRA,
)

IDS = torch.arange(1, 25).view(2, 12)
SETTINGS = {
    **{kind: ADAPTER_SETTINGS[kind]() for kind in ADAPTERS if kind != "fusion"},
    "fusion": AdapterFusion(adapters=("after_one", "after_two")),
    "fusion_beside": AdapterFusion(adapters=("beside_one", "beside_two")),
    "bottleneck_pfeiffer": Bottleneck(size=4, after="feed_forward", activation="gelu"),
    "bottleneck_parallel": Bottleneck(size=4, parallel=True, scale=4.0, activation="silu"),
    "lora_rank_stabilised": LoRA(r=8, alpha=5, rs_scaling=True, init="gaussian"),
    "lora_on_two_layers": LoRA(r=2, target_modules=("v_proj", "down_proj")),
    "lora_with_biases": LoRA(r=2, bias="lora_only", target_modules=("v_proj",)),
    "lora_with_all_biases": LoRA(r=2, bias="all", target_modules=("v_proj",)),
    "lora_with_modules": LoRA(r=2, modules_to_save=("lm_head", "model.norm")),
    "lora_pissa": LoRA(r=4, alpha=4, init="pissa"),
    "lora_olora": LoRA(r=4, alpha=4, init="olora"),
    "lora_patterns": LoRA(r=4, rank_pattern={"v_proj": 2}, alpha_pattern={"mlp.up_proj": 1}, layers_to_transform=(1,)),
    "loha_patterns": LoHa(r=2, rank_pattern={"v_proj": 6}, alpha_pattern={"mlp.up_proj": 1}),
    "lokr_thin": LoKr(r=2, decompose_both=True, decompose_factor=8),
    "vera_of_low_rank": VeRA(r=4, projection_seed=1, target_modules=("v_proj", "o_proj", "down_proj")),
    "ia3_on_attention": IA3(target_modules=("q_proj", "o_proj"), layers_to_transform=(1,)),
    "dora_with_bias": DoRA(r=4, bias="lora_only"),
    "prefix_encoded": Prefix(num_virtual_tokens=3, encoder_hidden_size=5),
    "prompt_at_random": Prompt(num_virtual_tokens=3, init="random"),
    "adalora_small": AdaLoRA(target_r=1, init_r=3, alpha=20, layers_to_transform=(0,)),
    "dylora_from_2": DyLoRA(r=6, min_r=2, alpha=3, target_modules=("v_proj", "down_proj")),
}
MEMBERS = {  # of the fusions; made by a fixture
    "after_one": Bottleneck(size=3, scale=0.5),
    "after_two": Bottleneck(size=5, activation="gelu"),
    "beside_one": Bottleneck(size=3, parallel=True),
    "beside_two": Bottleneck(size=3, parallel=True),
}
NEVER_MERGED = {"bottleneck", "fusion", "prefix", "prompt"}  # no change of one weight is what they do
NO_IDENTITY = {
    *("prefix", "prefix_encoded", "prompt", "prompt_at_random"),  # whatever stands before a text is seen by it
    *("fusion", "fusion_beside"),  # starts as the average of trained members, and these do something
}
CONSTANTS_IN_BACKWARD = {"dora"}  # the norm, by the paper's section 4.3
SEEDLESS = {
    *("bitfit", "lora_olora", "lora_pissa"),  # start from the model's weights alone
    *("ia3", "ia3_on_attention", "vera", "vera_of_low_rank"),  # at constants; VeRA's pair has a seed of its own
}
OPEN_START = {"lora_olora": 1e-5, "lora_pissa": 1e-5}  # what is taken off again is so up to the order of sums


MERGED = {case: settings for case, settings in SETTINGS.items() if settings.type not in NEVER_MERGED}


@pytest.fixture(scope="module", autouse=True)
def _members(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The fusions' members, as if trained, in folders of the current one."""
    with chdir(tmp_path_factory.mktemp("members")):
        for seed, (name, settings) in enumerate(MEMBERS.items()):
            model = network()
            inject(model, settings, seed=seed)
            perturb(model, seed=seed)
            save_adapter(model, Path(name), base_model="base")
        yield


@pytest.fixture(params=SETTINGS)
def settings(request: pytest.FixtureRequest) -> AdapterSettings:
    return SETTINGS[request.param]


@pytest.fixture(params=MERGED)
def merged(request: pytest.FixtureRequest) -> AdapterSettings:
    """Settings of an adapter that can be merged."""
    return MERGED[request.param]


def network() -> LlamaForCausalLM:
    """Frozen, with biases in attention."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    register_attention()
    config = LlamaConfig(
        **sizes,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
        attn_implementation=ATTENTION,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def perturb(model: nn.Module, *, name: str = "default", seed: int = 5) -> None:
    """As if trained: each parameter of one adapter at random."""
    for key, parameter in adapter_parameters(model).items():
        if f".adapters.{name}." in key:
            generator = torch.Generator().manual_seed(seed + len(key))
            nn.init.normal_(parameter, std=0.2, generator=generator)


def adapted(settings: AdapterSettings) -> LlamaForCausalLM:
    model = network()
    inject(model, settings, seed=3)
    perturb(model)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    result: Tensor = model(IDS).logits
    return result


@pytest.mark.parametrize("case", [case for case in SETTINGS if case not in NO_IDENTITY])
def test_an_adapter_starts_as_the_identity(case: str) -> None:
    model = network()
    before = logits(model)
    assert inject(model, SETTINGS[case], seed=3)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=OPEN_START.get(case, 0))


def test_merging_equals_applying(merged: AdapterSettings) -> None:
    """To 1e-5: one product instead of two, in float32."""
    model = adapted(merged)
    applied = logits(model)
    assert merge_adapters(model) == len(inject(network(), merged, seed=0))
    assert not adapted_layers(model)
    torch.testing.assert_close(logits(model), applied, rtol=0, atol=1e-5)
    assert (applied - logits(network())).abs().max() > 1e-2


@pytest.mark.parametrize("kind", sorted(NEVER_MERGED & set(ADAPTERS)))
def test_what_cannot_be_merged_says_what_to_do(kind: str) -> None:
    model = adapted(SETTINGS[kind])
    applied = logits(model)
    with pytest.raises(AdapterError, match="cannot be merged into the weights; keep it beside the model"):
        merge_adapters(model)
    assert torch.equal(logits(model), applied)


def test_off_equals_the_base_exactly_and_on_comes_back(settings: AdapterSettings) -> None:
    model, base = adapted(settings), logits(network())
    applied = logits(model)
    with adapters_off(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), applied)


def test_an_error_while_off_turns_adapters_on_again(settings: AdapterSettings) -> None:
    model = adapted(settings)
    applied = logits(model)
    with pytest.raises(ZeroDivisionError), adapters_off(model):
        raise ZeroDivisionError
    assert torch.equal(logits(model), applied)


def test_removing_gives_the_base_back_bit_for_bit(settings: AdapterSettings) -> None:
    model, base = adapted(settings), network().state_dict()
    remove_adapters(model)
    assert list(model.state_dict()) == list(base)
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())


def test_gradients_reach_only_the_adapters_own_parameters(settings: AdapterSettings) -> None:
    model = adapted(settings)
    model(IDS, labels=IDS).loss.backward()
    own = adapter_parameters(model)
    assert all(p.grad is not None and bool(p.grad.any()) for p in own.values())
    assert {n for n, p in model.named_parameters() if p.grad is not None} == own.keys()


def test_gradients_of_the_parameters_agree_with_finite_differences(settings: AdapterSettings) -> None:
    model = network().double()
    adapter = next((a.double() for a in inject(model, settings, seed=3) if a.sees_rows), None)
    if adapter is None or settings.type in CONSTANTS_IN_BACKWARD:
        pytest.skip("not on a linear layer, or with constants in its backward pass")
    adapter.settings = adapter.settings.model_copy(update={"dropout": 0.0})
    perturb(model)
    x = torch.randn(3, adapter.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(adapter.out_features, adapter.in_features, dtype=torch.float64) / 8
    names = [name for name, _ in adapter.named_parameters()]

    def run(*values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        output: Tensor = torch.func.functional_call(adapter, given, (x, lambda t: t @ weight.T))
        return output

    assert torch.autograd.gradcheck(run, list(adapter.parameters()), fast_mode=True)


def test_merging_is_pure(merged: AdapterSettings) -> None:
    model = adapted(merged)
    path, layer = next(iter(adapted_layers(model).items()))
    before = network().get_submodule(path)
    weight, bias = layer.merged()
    assert torch.equal(layer.base.weight, before.weight)
    assert not (torch.equal(weight, before.weight) and torch.equal(bias, before.bias))
    assert weight.shape == before.weight.shape
    assert (bias is None) == (before.bias is None)


def test_two_adapters_at_once_equal_both_updates(merged: AdapterSettings) -> None:
    """One of each kind is injected over the first; both together are both merged, one after the other."""
    model = adapted(merged)
    inject(model, LoRA(r=4, target_modules=("v_proj", "up_proj")), seed=4, name="second")
    perturb(model, name="second", seed=50)
    together = logits(model)
    second = {k: p.clone() for k, p in adapter_parameters(model).items() if ".adapters.second." in k}
    one_by_one = adapted(merged)
    merge_adapters(one_by_one)
    inject(one_by_one, LoRA(r=4, target_modules=("v_proj", "up_proj")), seed=4, name="second")
    one_by_one.load_state_dict(second, strict=False)
    torch.testing.assert_close(logits(one_by_one), together, rtol=0, atol=1e-5)
    merge_adapters(model)
    torch.testing.assert_close(logits(model), together, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", SETTINGS)
def test_start_values_depend_on_seed_and_layer_alone(case: str) -> None:
    settings = SETTINGS[case]

    def start(seed: int, *, before: AdapterSettings | None = None) -> dict[str, Tensor]:
        model = network()
        if before is not None:
            inject(model, before, seed=9, name="other")
        inject(model, settings, seed=seed)
        return {k: p for k, p in adapter_parameters(model).items() if ".adapters.default." in k}

    first, again, other = start(3), start(3, before=LoRA(r=2)), start(4)
    assert first.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert case in SEEDLESS or any(not torch.equal(value, other[name]) for name, value in first.items())


def test_a_bfloat16_layer_is_merged_in_float32_and_rounded_once(merged: AdapterSettings) -> None:
    """So the merged weight is within half of bfloat16's last place, 2^-8 of it, of the exact one."""
    model = network().bfloat16()
    inject(model, merged, seed=3)
    perturb(model)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    layer = next(iter(adapted_layers(model).values()))
    weight, _ = layer.merged()
    assert weight.dtype == torch.bfloat16
    exact, _ = deepcopy(layer).double().merged()
    torch.testing.assert_close(weight.double(), exact, rtol=2**-8, atol=1e-6)


def test_a_network_in_evaluation_stays_in_evaluation(settings: AdapterSettings) -> None:
    """Otherwise dropout would act where a model is only read."""
    model = adapted(settings)
    assert not any(module.training for module in model.modules())


def test_dropout_acts_in_training_alone() -> None:
    model = adapted(LoRA(r=4, dropout=0.5))
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_all_linear_means_every_linear_layer_but_the_output_layer() -> None:
    model = network()
    inject(model, LoRA(r=4), seed=0)
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    mlp = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert list(adapted_layers(model)) == [f"model.layers.{i}.{part}" for i in (0, 1) for part in (*parts, *mlp)]


def test_a_target_is_a_name_or_its_end() -> None:
    model = network()
    inject(model, LoRA(r=4, target_modules=("layers.1.mlp.up_proj", "q_proj")), seed=0)
    layers = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert sorted(adapted_layers(model)) == sorted([*layers, "model.layers.1.mlp.up_proj"])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (LoRA(r=4, target_modules=("q_proj", "v_porj")), 'named "v_porj"; did you mean "v_proj"?'),
        (LoRA(r=4, target_modules=("proj",)), 'named "proj"'),
        (LoRA(r=17), "model.layers.0.self_attn.k_proj: r: 17 is above the layer's size; at most 16"),
    ],
    ids=["misspelt", "end of a word", "rank"],
)
def test_what_does_not_fit_is_refused_and_leaves_the_network_as_it_was(settings: LoRA, sentence: str) -> None:
    model = network()
    with pytest.raises(AdapterError, match=re.escape(sentence)):
        inject(model, settings, seed=0)
    assert list(model.state_dict()) == list(network().state_dict())


def test_a_module_that_shares_its_weight_is_not_trained_alone() -> None:
    """Merging its copy would change the other too."""
    model = network()
    model.lm_head.weight = model.model.embed_tokens.weight
    for name in ("lm_head", "embed_tokens"):
        with pytest.raises(AdapterError, match="shares its weight with"):
            inject(model, LoRA(r=4, modules_to_save=(name,)), seed=0)
    assert not adapted_layers(model)


def test_a_model_without_linear_layers_and_the_output_layer_are_refused() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(AdapterError, match="GPT2LMHeadModel has no linear layer"):
        inject(gpt2, LoRA(r=4), seed=0)
    with pytest.raises(AdapterError, match="lm_head is the output layer, which is not adapted; set modules_to_save"):
        inject(network(), LoRA(r=4, target_modules=("q_proj", "lm_head")), seed=0)


def test_dora_with_a_bias_stands_over_an_adapter_of_the_bias() -> None:
    """To 1e-5: one product instead of two."""
    model = network()
    inject(model, ADAPTER_SETTINGS["bitfit"](), seed=0)
    inject(model, DoRA(r=4, bias="lora_only"), seed=1, name="second")
    perturb(model)
    perturb(model, name="second", seed=50)
    applied = logits(model)
    merge_adapters(model)
    torch.testing.assert_close(logits(model), applied, rtol=0, atol=1e-5)


def test_dora_goes_where_its_network_goes() -> None:
    """The meta device stands for another one."""
    model = adapted(DoRA(r=4))
    logits(model)
    model.to("meta")
    assert model(IDS.to("meta")).logits.device.type == "meta"


def test_a_name_that_is_taken_is_refused_and_leaves_the_network_as_it_was() -> None:
    model = network()
    inject(model, LoRA(r=4, target_modules=("down_proj",)), seed=0)
    names = list(model.state_dict())
    with pytest.raises(AdapterError, match='an adapter named "default" is there already'):
        inject(model, LoRA(r=4), seed=0)
    assert list(model.state_dict()) == names
