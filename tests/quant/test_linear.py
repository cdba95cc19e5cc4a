"""Every quantizer's layer is the dense layer that holds the dequantized weight, and keeps no dense weight."""

import weakref
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.adapters.inject import inject
from luthier.errors import ModelError
from luthier.kernels.low_rank import add_low_rank, add_low_rank_plain
from luthier.models.fuse import fuse
from luthier.quant.linear import QUANTIZERS, QuantizedLinear, quantize_layers, round_trip
from luthier.recipe.adapters import LoRA

IDS = torch.arange(1, 25).view(2, 12)


@pytest.fixture(params=QUANTIZERS)
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def dense(*, bias: bool = True, dtype: torch.dtype = torch.float32, sizes: tuple[int, int] = (48, 40)) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(*sizes, bias=bias, dtype=dtype)


def holding_dequantized(linear: nn.Linear, scheme: str) -> nn.Linear:
    """A dense layer with the weight that `scheme` leaves of this one's."""
    other = deepcopy(linear)
    other.weight = nn.Parameter(round_trip(linear.weight, scheme), requires_grad=False)
    return other


def network(*, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [(3,), (40,), (2, 3, 20)], ids=str)
def test_value_and_gradients_are_those_of_the_dequantized_weight(
    scheme: str, rows: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Bit for bit but for float32, whose products may run in another library: to 1e-5 of numbers near 1."""
    linear = dense(dtype=dtype)
    layer, other = QuantizedLinear.of(linear, scheme), holding_dequantized(linear, scheme)
    inputs = [torch.randn(*rows, 48, generator=torch.Generator().manual_seed(1)).to(dtype) for _ in range(2)]
    for module, x in zip((layer, other), inputs, strict=True):
        module(x.requires_grad_()).square().sum().backward()
    bound = 1e-5 if dtype == torch.float32 else 0
    torch.testing.assert_close(layer(inputs[0]), other(inputs[1]), rtol=bound, atol=bound)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=bound, atol=20 * bound)
    torch.testing.assert_close(layer.bias.grad, other.bias.grad, rtol=bound, atol=20 * bound)


def test_the_gradient_agrees_with_finite_differences(scheme: str) -> None:
    layer = QuantizedLinear.of(dense(dtype=torch.float64, sizes=(6, 5)), scheme)
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows, _: layer(rows), (x, layer.bias))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
def test_what_it_is_added_to_has_the_outputs_gradient(scheme: str, bias: bool) -> None:
    layer = QuantizedLinear.of(dense(bias=bias, dtype=torch.float64, sizes=(6, 5)), scheme)
    generator = torch.Generator().manual_seed(1)
    x, added = (torch.randn(3, n, dtype=torch.float64, generator=generator, requires_grad=True) for n in (6, 5))
    given = (x, added, *([layer.bias] if bias else []))
    assert torch.autograd.gradcheck(lambda rows, onto, *_: layer(rows, onto=onto * 1), given)
    torch.testing.assert_close(layer(x, onto=added * 1), layer(x) + added, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [(11,), (2, 11)], ids=str)
def test_an_adapter_may_write_into_the_output(scheme: str, rows: tuple[int, ...]) -> None:
    """To 1e-5, gradients of the largest: float32 sums of other order."""
    layer = QuantizedLinear.of(dense().requires_grad_(False), scheme)
    generator = torch.Generator().manual_seed(1)
    x, a, b = (torch.randn(*size, generator=generator).requires_grad_() for size in ((*rows, 48), (4, 48), (40, 4)))
    output = layer(x).view(-1, 40)
    written = add_low_rank(output, x.view(-1, 48), a, b, 0.5)
    assert written.data_ptr() == output.data_ptr()
    plain = add_low_rank_plain(nn.functional.linear(x, layer.weight, layer.bias), x, a, b, 0.5).view(-1, 40)
    torch.testing.assert_close(written, plain, rtol=1e-5, atol=1e-5)
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), (x, a, b)) for y in (written, plain)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))


def test_the_backward_pass_keeps_what_is_stored_and_no_more(scheme: str) -> None:
    layer, kept = QuantizedLinear.of(dense(), scheme), list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.ones(16, 48, requires_grad=True))
    assert sum(t.nbytes for t in kept) == layer.num_bytes < 0.3 * 4 * 48 * 40
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in layer.buffers()}


def test_a_state_dict_restores_the_layer_bit_for_bit(scheme: str) -> None:
    layer = QuantizedLinear.of(dense(), scheme)
    other = QuantizedLinear.of(nn.Linear(48, 40), scheme)
    assert not torch.equal(other.weight, layer.weight)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)
    assert all(torch.equal(a, b) for a, b in zip(other.stored, layer.stored, strict=True))
    assert torch.equal(other.bias, layer.bias)


def test_moved_to_another_type_a_layer_computes_in_it_from_the_same_numbers(scheme: str) -> None:
    layer = QuantizedLinear.of(dense(), scheme)
    weight, types = layer.weight, [t.dtype for t in layer.stored]
    layer.to(torch.bfloat16)
    assert [t.dtype for t in layer.stored] == types
    assert torch.equal(layer.weight, weight.to(torch.bfloat16))
    assert layer(torch.ones(2, 48, dtype=torch.bfloat16)).dtype == layer.bias.dtype == torch.bfloat16


def test_a_layer_says_what_it_is(scheme: str) -> None:
    layer = QuantizedLinear.of(dense(bias=False).eval(), scheme)
    assert (layer.in_features, layer.out_features, layer.bias, layer.training) == (48, 40, None, False)
    assert repr(layer) == f"QuantizedLinear(in_features=48, out_features=40, bias=False, scheme={scheme})"


@pytest.mark.parametrize("real_constants", [False, True])
def test_a_plan_runs_it_without_values_and_leaves_no_trace(scheme: str, real_constants: bool) -> None:
    with FakeTensorMode(allow_non_fake_inputs=real_constants):
        planned = network()
        quantize_layers(planned, scheme)
        embedded = planned.get_input_embeddings()(torch.ones(2, 12, dtype=torch.long)).requires_grad_()
        planned(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad.shape == (2, 12, 32)
    real = network()
    quantize_layers(real, scheme)
    pairs = zip(planned.buffers(), real.buffers(), strict=True)
    assert all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs)
    assert bool(real(IDS).logits.isfinite().all())


@pytest.mark.parametrize("fast", [False, True])
def test_a_networks_linear_layers_are_exchanged_but_for_its_head(scheme: str, fast: bool) -> None:
    """To 1e-5: float32 products in another library."""
    ours, expected = network(), network()
    if fast:
        fuse(ours)
    for name, module in expected.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.copy_(round_trip(module.weight, scheme))
    assert quantize_layers(ours, scheme) == 2 * 7
    assert {n for n, m in ours.named_modules() if isinstance(m, nn.Linear)} == {"lm_head"}
    torch.testing.assert_close(ours(IDS).logits, expected(IDS).logits, rtol=0, atol=1e-5)


def test_what_shares_its_weight_with_an_embedding_stays_dense(scheme: str) -> None:
    body = nn.ModuleDict({"embed": nn.Embedding(9, 16), "tied": nn.Linear(16, 9), "other": nn.Linear(16, 9)})
    body["tied"].weight = body["embed"].weight
    assert quantize_layers(body, scheme) == 1
    assert body["tied"].weight is body["embed"].weight
    tied = network(tied=True)
    quantize_layers(tied, scheme)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_layers_under_adapters_are_exchanged_and_those_within_stay(scheme: str) -> None:
    model = network()
    inject(model, LoRA(r=2, target_modules=("q_proj",)), seed=0)
    adapted = model.model.layers[0].self_attn.q_proj
    adapted.adapters["bottleneck"] = nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 32))
    assert quantize_layers(model, scheme) == 2 * 7
    assert isinstance(adapted.base, QuantizedLinear)
    assert all(isinstance(layer, nn.Linear) for layer in adapted.adapters["bottleneck"])
    del adapted.adapters["bottleneck"]  # which was none that can be called
    model(IDS).logits.sum().backward()
    assert bool(adapted.adapters["default"].lora_B.grad.any())


def test_what_is_stored_and_who_is_told_is_the_callers_to_say(scheme: str) -> None:
    body = nn.ModuleDict({name: nn.Linear(16, 16) for name in "abc"})
    expected = round_trip(body["a"].weight / 2, scheme)
    told: dict[str, nn.Module] = {}
    halved = {"strip": lambda path, weight: weight / 2 if path == "a" else weight}
    assert quantize_layers(body, scheme, keep=["c"], exchanged=told.__setitem__, **halved) == 2
    assert torch.equal(body["a"].weight, expected)
    assert told == {"a": body["a"], "b": body["b"]}
    assert isinstance(body["c"], nn.Linear)


def test_a_layer_in_two_places_stays_one(scheme: str) -> None:
    shared = nn.Linear(16, 16)
    body = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared}), "d": nn.Linear(16, 16)})
    del shared
    assert quantize_layers(body, scheme) == 2
    assert body["a"] is body["b"]["c"]
    assert isinstance(body["a"], QuantizedLinear)


def test_each_dense_weight_is_freed_before_the_next_is_quantized(scheme: str) -> None:
    body = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    weights, alive = [weakref.ref(layer.weight) for layer in body], list[int]()
    quantize_layers(body, scheme, exchanged=lambda *_: alive.append(sum(w() is not None for w in weights)))
    assert alive == [3, 2, 1, 0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: its numbers cannot be compared with")
def test_a_gpu_makes_the_same_weight(scheme: str) -> None:
    layer = QuantizedLinear.of(dense(), scheme)
    expected, x = layer.weight, torch.randn(16, 48, generator=torch.Generator().manual_seed(1))
    result = layer(x)
    layer.to("cuda")
    assert torch.equal(layer.weight.cpu(), expected)
    torch.testing.assert_close(layer(x.cuda()).cpu(), result, rtol=1e-5, atol=1e-5)


def test_an_unknown_scheme_is_refused_with_the_nearest() -> None:
    with pytest.raises(ModelError, match='quantize_base: "nf5": unknown scheme; did you mean "nf4"'):
        quantize_layers(network(), "nf5")


@pytest.mark.parametrize(
    ("weight", "kind"),
    [
        (torch.ones(8), r"float32 of shape \[8\]"),
        (torch.ones(8, 8, dtype=torch.int8), r"int8 of shape \[8, 8\]"),
        (torch.ones(0, 8), r"float32 of shape \[0, 8\]"),
    ],
    ids=["vector", "integers", "empty"],
)
def test_what_is_no_matrix_of_numbers_is_refused(weight: Tensor, kind: str, scheme: str) -> None:
    with pytest.raises(ModelError, match=f"a weight of type {kind} cannot be quantized; give a matrix"):
        round_trip(weight, scheme)


def test_what_is_quantized_already_is_refused(scheme: str) -> None:
    model = network()
    quantize_layers(model, scheme)
    with pytest.raises(ModelError, match=r"self_attn.q_proj: is quantized already; load the model anew"):
        quantize_layers(model, scheme)
    with pytest.raises(ModelError, match="a QuantizedLinear cannot be quantized; give a dense linear layer"):
        QuantizedLinear.of(model.model.layers[0].mlp.up_proj, scheme)


def test_a_network_without_linear_layers_is_refused(scheme: str) -> None:
    with pytest.raises(ModelError, match="ModuleList has no linear layer to quantize; set quantize_base: none"):
        quantize_layers(nn.ModuleList([nn.Embedding(4, 4)]), scheme)


def test_a_batch_without_tokens_keeps_its_dimensions(scheme: str) -> None:
    layer = QuantizedLinear.of(nn.Linear(64, 24), scheme)
    assert layer(torch.empty(2, 0, 64)).shape == (2, 0, 24)
