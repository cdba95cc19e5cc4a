"""In bfloat16 a small change of a layer's outputs is not lost in their rounding.

Rounding keeps of a change much smaller than the last place either nothing or the whole place; so over many outputs it
keeps the change on average, if what is rounded is the sum. Beside outputs that were rounded before, most of it is gone.
How much there is of an exact change u in what was found: (found . u) / (u . u).
"""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.adapters.adapted import AdaptedLinear
from luthier.adapters.inject import adapted_layers, inject
from luthier.models.float8 import in_float8
from luthier.models.fuse import fuse
from luthier.models.packed import PackedLinear
from luthier.quant.linear import quantize_layers
from luthier.recipe.adapters import ADAPTER_SETTINGS, AnyAdapter, LoHa, LoKr, LoRA
from luthier.recipe.precision import CurrentFP8

SMALL = 1 / 2000  # of the outputs; rounding changes a number by up to 1/512 or 1/256 of it
WHOLE = pytest.approx(1.0, abs=0.2)  # of 400 x 320 outputs: four deviations of what rounding leaves to chance
LINEAR_IN = {  # by which parameter the change grows in proportion
    **{"adalora": "lora_E", "bitfit": "bias", "dora": "lora_B", "dylora": "lora_B", "loha": "hada_w1_a"},
    **{"loha_thin": "hada_w1_a", "lokr": "lokr_w1", "lora": "lora_B", "vera": "vera_lambda_b"},
}


def settings_of(kind: str) -> AnyAdapter:
    sized = {"loha": LoHa(r=16), "loha_thin": LoHa(r=2), "lokr": LoKr(r=4)}
    return (sized.get(kind) or ADAPTER_SETTINGS[kind]()).model_copy(update={"target_modules": ("gate_proj",)})


def network(*, bias: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=4, mlp_bias=bias)
    model = LlamaForCausalLM(config).requires_grad_(False).bfloat16().eval()
    if bias:
        nn.init.normal_(model.model.layers[0].mlp.gate_proj.bias)
    return model


def inputs() -> Tensor:
    return torch.randn(400, 256, generator=torch.Generator().manual_seed(1)).bfloat16()


@torch.no_grad()
def put(model: nn.Module, kind: str, *, name: str = "default") -> AdaptedLinear:
    """The layer with such an adapter outermost, which changes the outputs by SMALL of their size."""
    inject(model, settings_of(kind), seed=0, name=name)
    layer = adapted_layers(model)["model.layers.0.mlp.gate_proj"]
    assert isinstance(layer, AdaptedLinear)
    draw(layer, name, std=0.1, but="magnitude")
    without, change = outputs_and_change(deepcopy(layer).double(), inputs().double(), name)
    layer.adapters[name].get_parameter(LINEAR_IN[kind]).mul_(SMALL * without.norm() / change.norm())
    return layer


def draw(layer: AdaptedLinear, name: str, *, std: float, mean: float = 0.0, but: str = "") -> None:
    for i, (key, parameter) in enumerate(layer.adapters[name].named_parameters()):
        if key != but:
            nn.init.normal_(parameter, mean, std, generator=torch.Generator().manual_seed(i))


@torch.no_grad()
def outputs_and_change(layer: AdaptedLinear, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """What the layer gives without this adapter, and what the adapter changes, whatever else applies."""
    applied = layer.active
    with_it = layer(x)
    layer.active = tuple(other for other in applied if other != name)
    without = layer(x)
    layer.active = applied
    return without, with_it.double() - without.double()


def kept(layer: AdaptedLinear, name: str = "default") -> float:
    """How much of the change by this adapter there is in the layer's outputs."""
    _, exact = outputs_and_change(deepcopy(layer).double(), inputs().double(), name)
    _, found = outputs_and_change(layer, inputs(), name)
    return float((found * exact).sum() / exact.square().sum())


def test_of_what_is_added_to_rounded_outputs_much_is_lost() -> None:
    """What the measure says of the other order."""
    layer = put(network(), "lora")
    layer.base.register_forward_hook(lambda *_: None)
    assert kept(layer) < 0.5


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("kind", LINEAR_IN)
def test_a_change_by_any_type_is_kept(kind: str, bias: bool) -> None:
    assert kept(put(network(bias=bias), kind)) == WHOLE


def over(model: nn.Module, base: str) -> None:
    """Stores the model's layers in this form."""
    if base in {"nf4", "int8"}:
        quantize_layers(model, base)
    elif base != "plain":
        fuse(model)
    if base == "fp8":
        in_float8(model, CurrentFP8())


@pytest.mark.parametrize("base", ["fast", "fp8", "nf4", "int8"])
def test_a_change_is_kept_over_any_base(base: str) -> None:
    model = network()
    over(model, base)
    assert kept(put(model, "lora")) == WHOLE


@pytest.mark.parametrize("num_rows", [8, 400], ids=["few rows", "many rows"])
@pytest.mark.parametrize("form", ["fp16", "int8"])
def test_a_change_is_kept_while_answers_are_sampled(form: str, num_rows: int) -> None:
    """In layers of few bytes, and in the dense ones that many rows pass through."""
    model = network()
    layer = put(model, "lora")
    dense, packed = layer.base, PackedLinear(layer.base, form)
    found = []
    with torch.no_grad():
        for base in (packed, dense):
            layer.base = base
            parts = [outputs_and_change(layer, x, "default")[1] for x in inputs().split(num_rows)]
            found.append(torch.cat(parts))
        layer.base = dense
        _, exact = outputs_and_change(deepcopy(layer).double(), inputs().double(), "default")
    assert [float((one * exact).sum() / exact.square().sum()) for one in found] == [WHOLE, WHOLE]


@pytest.mark.parametrize("base", ["plain", "fast", "fp8", "nf4", "int8"])
@pytest.mark.parametrize("kind", ["lora", "lokr", "bitfit"])
def test_a_new_adapter_changes_no_output_of_a_layer_with_a_bias(kind: str, base: str) -> None:
    """To the bit: a policy starts as its own reference."""
    model = network(bias=True)
    over(model, base)
    inject(model, settings_of(kind), seed=0)
    layer = adapted_layers(model)["model.layers.0.mlp.gate_proj"]
    with torch.no_grad():
        assert torch.equal(layer(inputs()), layer.base(inputs()))


@pytest.mark.parametrize("base", ["plain", "fast", "nf4"])
def test_hooks_see_what_the_layer_gives(base: str) -> None:
    model = network()
    over(model, base)
    layer, seen = put(model, "lora"), []
    with torch.no_grad():
        expected = layer.base(inputs())
        layer.base.register_forward_hook(lambda module, given, output: seen.append(output.clone()))
        layer(inputs())
    assert torch.equal(*seen, expected)


def test_another_formula_in_place_of_a_layers_own_is_used() -> None:
    layer = put(network(), "lora")
    layer.base.forward = lambda x: x.new_zeros(len(x), 320)
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs()), layer.adapters["default"].add(inputs(), None), rtol=0, atol=0)


@pytest.mark.parametrize("inner", ["bitfit", "lora", "lokr"])
def test_changes_by_two_adapters_are_both_kept(inner: str) -> None:
    model = network()
    put(model, inner, name="inner")
    layer = put(model, "lora", name="outer")
    assert layer.active == ("inner", "outer")
    assert kept(layer, "inner") == WHOLE
    assert kept(layer, "outer") == WHOLE


@pytest.mark.parametrize("inner", ["dora", "ia3", "ia3_before", "lora_in_part"])
def test_over_what_is_no_sum_a_change_is_added(inner: str) -> None:
    """Adapters that multiply outputs, or mix them, round them first; three roundings, of 1/256 at most."""
    model = network()
    kind, _, variant = inner.partition("_")
    settings = settings_of(kind)
    if kind == "ia3":
        settings = settings.model_copy(update={"feedforward_modules": ("gate_proj",) if variant else ()})
    inject(model, settings, seed=0, name="inner")
    layer = adapted_layers(model)["model.layers.0.mlp.gate_proj"]
    draw(layer, "inner", std=0.1, mean=0.5)
    layer.shares = {"inner": 0.5} if inner == "lora_in_part" else {}
    put(model, "lora", name="outer")
    with torch.no_grad():
        layer.adapters["outer"].lora_B.mul_(0.3 / SMALL)
        found, exact = layer(inputs()).double(), deepcopy(layer).double()(inputs().double())
        for name in ("inner", "outer"):
            _, change = outputs_and_change(deepcopy(layer).double(), inputs().double(), name)
            assert change.norm() > 0.1 * exact.norm(), f"the test would not see whether {name} is there"
    torch.testing.assert_close(found, exact, rtol=0, atol=3 / 256 * float(exact.abs().max()))


def test_over_rows_of_new_tokens_a_bias_is_added() -> None:
    """On an output layer with a bias; a rounding of 1/256 for every product."""
    model = network()
    model.lm_head = nn.Linear(256, 97, bias=True).requires_grad_(False).bfloat16()
    inject(model, LoRA(target_modules=("gate_proj",), trainable_token_indices=(3, 5)), seed=0, name="inner")
    inject(model, LoRA(target_modules=("gate_proj",), bias="all"), seed=0, name="outer")
    layer = adapted_layers(model)["lm_head"]
    assert layer.active == ("inner", "outer")
    for name in layer.active:
        draw(layer, name, std=1.0)
    with torch.no_grad():
        found, exact = layer(inputs()).double(), deepcopy(layer).double()(inputs().double())
    torch.testing.assert_close(found, exact, rtol=0, atol=3 / 256 * float(exact.abs().max()))


def test_gradients_in_bfloat16_are_those_of_float64_to_its_rounding() -> None:
    """Of two adapters over a layer with a bias: each product rounds to 2^-8, and there are four in a chain."""
    model = network(bias=True)
    put(model, "lokr", name="inner")
    layer = put(model, "lora", name="outer")
    exact = deepcopy(layer).double()
    grads = []
    for each, x in ((layer, inputs()), (exact, inputs().double())):
        x.requires_grad_()
        parameters = list(each.adapters.parameters())
        grads.append(torch.autograd.grad(each(x).square().sum(), [x, *parameters]))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=4 / 256 * float(other.abs().max()))
