"""Layers in few bytes are near the dense ones, sit under their adapters, and are gone when the context ends."""

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.adapters.adapted import bare
from luthier.adapters.inject import adapter_parameters, inject
from luthier.adapters.merge import merge_adapters
from luthier.adapters.switch import delete_adapter
from luthier.adapters.targets import named_places
from luthier.errors import RecipeError
from luthier.models.packed import MOST_ROWS, PackedLinear, Packing, can_pack, stored_bytes
from luthier.models.quantize import quantize_base
from luthier.quant.linear import quantize_layers
from luthier.recipe.adapters import AnyAdapter, BitFit, Bottleneck, DoRA, LoRA, VeRA
from luthier.recipe.training import Training
from luthier.shortage import function_of_c
from luthier.training import memory
from luthier.training.optimizers import make_optimizer
from luthier.training.precision import Precision, float32_masters

Factory = Callable[..., PreTrainedModel]

IDS = torch.arange(1, 13)[None]


def layer(num_out: int, num_in: int, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    generator = torch.Generator().manual_seed(num_out * 1000 + num_in)
    made = nn.Linear(num_in, num_out, bias=bias)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return made.to(dtype).requires_grad_(False)


def rows(count: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(count)).to(dtype)


@given(st.integers(1, MOST_ROWS), st.integers(1, 70), st.integers(1, 70), st.booleans())
def test_fp16_is_the_product_with_the_weight_rounded_to_float16(count: int, size: int, out: int, bias: bool) -> None:
    """Of any shape, summed in float32: 1e-6 of the sum of absolute values."""
    dense, x = layer(out, size, bias=bias), rows(count, size)
    rounded = dense.weight.half().double()
    expected = x.double() @ rounded.T + (dense.bias.double() if bias else 0)
    bound = 1e-6 * float((x.abs() @ dense.weight.abs().T).max() + 4)
    torch.testing.assert_close(PackedLinear(dense, "fp16")(x).double(), expected, rtol=0, atol=bound)


@pytest.mark.skipif(function_of_c("mallinfo2") is None, reason="the C library does not tell what is in use")
@pytest.mark.parametrize("form", ["dense", "fp16", "int8"])
@pytest.mark.parametrize("size", [300, 512, 576, 640, 641, 1088])
def test_stored_bytes_are_what_the_heap_then_has_in_use(size: int, form: str) -> None:
    """To 3%: scales of rows and small objects come on top."""
    dense, before = layer(4000, size, bias=False, dtype=torch.bfloat16), bytes_in_use()
    packed = PackedLinear(dense, form)
    assert packed.out_features == 4000  # it lives
    assert bytes_in_use() - before == pytest.approx(stored_bytes(form, 4000, size), rel=0.03, abs=50_000)


def bytes_in_use() -> int:
    told = function_of_c("mallinfo2")
    assert told is not None
    told.restype = memory._MallInfo
    found = told()
    return int(found.uordblks + found.hblkhd)


@pytest.mark.parametrize("size", [512, 513, 576, 640, 641, 1088])
def test_fp16_keeps_the_little_of_a_block_of_512_inputs_as_it_is(size: int) -> None:
    """For up to 128 of a begun block, the others are rounded."""
    dense, x = layer(40, size, bias=True), rows(5, size)
    kept = size % 512 if size % 512 <= 128 else 0
    rounded = torch.cat([dense.weight[:, : size - kept].half().double(), dense.weight[:, size - kept :].double()], 1)
    expected = x.double() @ rounded.T + dense.bias.double()
    bound = 1e-6 * float((x.abs() @ dense.weight.abs().T).max() + 4)
    torch.testing.assert_close(PackedLinear(dense, "fp16")(x).double(), expected, rtol=0, atol=bound)


@given(st.integers(1, MOST_ROWS), st.integers(1, 70), st.booleans())
def test_int8_holds_each_weight_to_half_a_step(size: int, out: int, bias: bool) -> None:
    """Seen by inputs of one 1 each, which bfloat16 holds exactly. A step is 1/127 of the largest weight of the row."""
    dense = layer(out, size, bias=bias)
    found = PackedLinear(dense, "int8")(torch.eye(size)).T - (dense.bias[:, None] if bias else 0)
    step = dense.weight.abs().amax(1, keepdim=True) / 127
    assert bool(((found - dense.weight).abs() <= 0.5 * step + 1e-6).all())


def test_int8_of_whole_codes_is_exact_but_for_the_products_own_rounding() -> None:
    """Weights that are whole steps already; inputs and sums are rounded to bfloat16's 8 bits, 2^-8 of all terms."""
    dense, x = layer(40, 70), rows(9, 70)
    dense.weight.copy_(dense.weight.mul(40).round().clamp(-127, 127))
    dense.weight[:, 0] = 127
    bound = 2**-8 * float((x.abs() @ dense.weight.abs().T).max())
    torch.testing.assert_close(PackedLinear(dense, "int8")(x), dense(x), rtol=0, atol=bound)


def test_a_row_of_zeros_stays_zero_and_the_bias_is_added() -> None:
    for form in ("fp16", "int8"):
        dense = layer(6, 32)
        dense.weight[2] = 0
        found = PackedLinear(dense, form)(rows(5, 32))
        torch.testing.assert_close(found[:, 2], dense.bias[2].expand(5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", ["fp16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_rows_are_the_dense_product_bit_for_bit(form: str, dtype: torch.dtype) -> None:
    dense = layer(33, 48, dtype=dtype)
    packed, many = PackedLinear(dense, form), rows(MOST_ROWS + 1, 48, dtype)
    assert torch.equal(packed(many), dense(many))
    assert len(packed_calls(packed, many)) == 0
    assert len(packed_calls(packed, many[:MOST_ROWS])) == 1


def packed_calls(packed: PackedLinear, x: Tensor) -> list[int]:
    """The numbers of rows that were multiplied by what is packed."""
    calls, multiply = [], packed.multiply
    packed.multiply = lambda rows: calls.append(len(rows)) or multiply(rows)
    packed(x)
    packed.multiply = multiply
    return calls


@pytest.mark.parametrize(("form", "tolerance"), [("fp16", 2**-8), ("int8", 2**-6)])
def test_bfloat16_comes_in_and_goes_out(form: str, tolerance: float) -> None:
    """Any number of leading sizes, none of them lost. fp16 is exact for such weights, so only the output is rounded;
    int8 rounds the weight to half of 1/127, and sums to 8 bits.
    """
    dense, x = layer(33, 48, dtype=torch.bfloat16), rows(12, 48, torch.bfloat16).view(3, 1, 4, 48)
    found = PackedLinear(dense, form)(x)
    assert found.dtype == torch.bfloat16
    assert found.shape == (3, 1, 4, 33)
    expected = dense.float()(x.float())
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def tiny(network: Factory, settings: AnyAdapter | None = None) -> PreTrainedModel:
    """Frozen; with an adapter as if trained."""
    built = network(tie_word_embeddings=True).requires_grad_(False)
    if settings is not None:
        inject(built, settings, seed=0)
        for i, parameter in enumerate(adapter_parameters(built).values()):
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(i))
    return built


def identity(model: nn.Module) -> list[tuple[Any, ...]]:
    """Every module and tensor by name and by what it is, shared ones as often as they stand there."""
    modules = [(name, id(m)) for name, m in model.named_modules(remove_duplicate=False)]
    tensors = [(name, id(t), t._version) for name, t in model.named_parameters(remove_duplicate=False)]
    places = [id(m.place) for m in model.modules() if ".adapters." in type(m).__module__ and hasattr(m, "place")]
    return [*modules, *tensors, *sorted(places)]


ADAPTERS = {
    "none": None,
    "lora": LoRA(r=4),
    "lora_bias": LoRA(r=4, bias="lora_only"),
    "dora": DoRA(r=4),
    "bitfit": BitFit(),
    "vera": VeRA(r=4),
    "bottleneck": Bottleneck(size=4),
    "whole_head": LoRA(r=4, modules_to_save=("norm",)),
    "new_tokens": LoRA(r=4, new_tokens=("<new>",)),
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize(("form", "tolerance"), [("fp16", 2e-3), ("int8", 0.1)])
@torch.no_grad()
def test_every_adapter_applies_over_packed_layers(network: Factory, name: str, form: str, tolerance: float) -> None:
    """Within float16's 11 bits, or int8's 7, of the largest logit, over two layers, and yet not equal: so each layer
    was called by what it is packed in, and nothing but the layers was exchanged.
    """
    model = tiny(network, ADAPTERS[name])
    expected, before = model(IDS, use_cache=False).logits, identity(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with Packing(model, form).applied():
        dense_calls = [m.dense.register_forward_hook(_refuse) for m in model.modules() if isinstance(m, PackedLinear)]
        found = model(IDS, use_cache=False).logits
        for hook in dense_calls:
            hook.remove()
    assert 0 < float((found - expected).abs().max()) < tolerance * float(expected.abs().max())
    assert identity(model) == before
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(IDS, use_cache=False).logits, expected)


def _refuse(*_: object) -> None:
    raise AssertionError("a packed layer was computed by the dense one")


@torch.no_grad()
def test_a_layer_that_an_adapter_has_a_copy_of_is_left_to_the_copy(network: Factory) -> None:
    settings = LoRA(r=4, target_modules=("q_proj",), modules_to_save=("gate_proj",))
    model = tiny(network, settings)
    expected = model(IDS, use_cache=False).logits
    with Packing(model, "fp16").applied():
        found = model(IDS, use_cache=False).logits
        packed = {path for path, place in named_places(model) if isinstance(bare(place), PackedLinear)}
    assert len(packed) == 13
    assert not any("gate_proj" in path for path in packed)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("form", ["dense", "fp16", "int8"])
@pytest.mark.parametrize("name", ["none", "lora", "dora", "bottleneck"])
def test_a_fault_in_the_middle_leaves_all_as_it_was(network: Factory, form: str, name: str) -> None:
    model = tiny(network, ADAPTERS[name])
    before = identity(model)

    def interrupted() -> None:
        with Packing(model, form).applied():
            assert identity(model) != before
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert identity(model) == before


def test_merged_weights_are_gone_when_the_context_ends(network: Factory) -> None:
    model = tiny(network, ADAPTERS["lora"])
    packing = Packing(model, "dense")
    with packing.applied():
        merged = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
        assert merged() is not model.model.layers[0].mlp.up_proj.base
    assert merged() is None


def packed_as(packing: Packing) -> dict[str, Any]:
    """What each layer is computed by, within the context, by its name without adapters."""
    with packing.applied():
        places = {name: bare(place) for name, place in named_places(packing.network)}
        return {name: layer.multiply for name, layer in places.items() if isinstance(layer, PackedLinear)}


def test_frozen_layers_are_packed_once_and_trained_ones_each_time(network: Factory) -> None:
    model = tiny(network)
    model.model.layers[1].mlp.up_proj.requires_grad_(True)
    packing = Packing(model, "fp16")
    first, second = packed_as(packing), packed_as(packing)
    assert len(first) == 15
    assert {name for name in first if first[name] is not second[name]} == {"model.layers.1.mlp.up_proj"}


def merged(model: PreTrainedModel) -> None:
    merge_adapters(model)


def replaced(model: PreTrainedModel) -> None:
    layer = model.model.layers[0].mlp.down_proj
    layer.weight.data = layer.weight.data * 3


@pytest.mark.parametrize("written", [merged, replaced])
@torch.no_grad()
def test_frozen_weights_that_were_written_into_are_packed_anew(
    network: Factory, written: Callable[[PreTrainedModel], None]
) -> None:
    model = tiny(network, LoRA(r=4, target_modules=("down_proj",), layers_to_transform=(0,)))
    packing = Packing(model, "fp16")
    if written is replaced:
        delete_adapter(model, "default")
    first = packed_as(packing)
    written(model)
    second = packed_as(packing)
    assert {name for name in second if second[name] is not first[name]} == {"model.layers.0.mlp.down_proj"}


@pytest.mark.parametrize("form", ["dense", "fp16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_step_of_full_fine_tuning_changed_is_seen(network: Factory, form: str, dtype: torch.dtype) -> None:
    """By the loop's own optimizer, which is fused and so counts no writing. The step moves every weight by 0.1."""
    model = tiny(network).to(dtype).requires_grad_(True)
    precision, packing = Precision(float32_masters(model)), Packing(model, form)
    settings = Training(data="rows.jsonl", learning_rate=0.1, weight_decay=0.0)
    optimizer = make_optimizer(model, settings, precision)
    first = packed_logits(model, packing)
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    optimizer.step()
    precision.write_back()
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits.float()
    second = packed_logits(model, packing)
    bound = (2**-5 if dtype == torch.bfloat16 else 2e-3) * float(expected.abs().max())
    torch.testing.assert_close(second, expected, rtol=0, atol=bound)
    assert float((first - second).abs().max()) > 5 * bound


@torch.no_grad()
def packed_logits(model: PreTrainedModel, packing: Packing) -> Tensor:
    with packing.applied():
        logits: Tensor = model(IDS, use_cache=False).logits.float()
    return logits


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
@torch.no_grad()
def test_quantized_layers_are_packed_from_what_they_compute(network: Factory, scheme: str) -> None:
    model = tiny(network)
    quantize_layers(model, scheme)
    expected, before = model(IDS, use_cache=False).logits, identity(model)
    with Packing(model, "fp16").applied():
        found = model(IDS, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))
    assert identity(model) == before


@torch.no_grad()
def test_an_idle_adapter_that_the_base_was_stripped_for_still_gives_back_its_part(network: Factory) -> None:
    """PiSSA took its principal part off the weight that was quantized; switched off, the part is put back."""
    model = tiny(network)
    inject(model, LoRA(r=4, init="pissa"), seed=0)
    quantize_base(model, "int8")
    for place in model.modules():
        if hasattr(place, "active"):
            place.active = ()
    expected = model(IDS, use_cache=False).logits
    with Packing(model, "fp16").applied():
        found = model(IDS, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


def test_what_cannot_be_packed_is_refused(network: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that is not on a CPU, and a CPU without FBGEMM, as other makes than x86 are."""
    model = tiny(network)
    assert can_pack(model)
    with pytest.raises(RecipeError, match="fp16 is had on x86 CPUs alone; choose dense"):
        Packing(tiny(network).to("meta"), "fp16")
    monkeypatch.setattr(torch.backends, "quantized", SimpleNamespace(supported_engines=["qnnpack"]))
    assert not can_pack(model)
    with pytest.raises(RecipeError, match="int8 is had on x86 CPUs alone; choose dense"):
        Packing(model, "int8")
