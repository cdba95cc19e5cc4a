"""A quantized base under adapters: what is trained is what is saved, loaded and merged."""

import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from luthier.adapters.inject import adapted_layers, adapter_parameters, inject
from luthier.adapters.merge import adapters_merged, merge_adapters, remove_adapters
from luthier.adapters.peft_format import read_adapter, save_adapter
from luthier.adapters.switch import activate, adapters_off, assign_rows, delete_adapter, mix_adapters
from luthier.errors import AdapterError, ModelError
from luthier.models.adapted import load_adapted
from luthier.models.load import load
from luthier.models.merge import merge_into
from luthier.models.quantize import quantize_base, quantized_as
from luthier.models.sources import resolve
from luthier.quant.linear import QuantizedLinear, round_trip
from luthier.recipe.adapters import AnyAdapter, DoRA, LoRA

IDS = torch.arange(1, 25).view(2, 12)
CASES = {
    "lora": LoRA(r=4),
    "lora_on_two": LoRA(r=4, target_modules=("q_proj", "down_proj")),
    "dora": DoRA(r=4),
    "loftq": LoRA(r=4, init="loftq", iterations=2),
    "olora": LoRA(r=4, init="olora"),
    "pissa": LoRA(r=4, init="pissa"),
}
FROM_THE_WEIGHT = ("loftq", "olora", "pissa")
each_scheme = pytest.mark.parametrize("scheme", ["nf4", "int8"])


def network() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    result: Tensor = model(IDS).logits
    return result


def adapted(settings: AnyAdapter, scheme: str, model: LlamaForCausalLM | None = None, *, trained: bool = True):
    model = model or network()
    inject(model, settings, seed=3, rounding=partial(round_trip, scheme=scheme))
    quantize_base(model, scheme)
    for i, parameter in enumerate(adapter_parameters(model).values() if trained else ()):
        with torch.no_grad():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    return model


@each_scheme
def test_the_linear_layers_are_stored_and_adapters_sit_on_them(scheme: str) -> None:
    model = adapted(LoRA(r=4, target_modules=("q_proj",), modules_to_save=("k_proj", "norm")), scheme)
    assert quantized_as(model) == scheme
    for path, layer in adapted_layers(model).items():
        assert isinstance(layer.base, QuantizedLinear) == path.endswith("q_proj"), path
        assert all(adapter.place is layer.base for adapter in layer.adapters.values())


@each_scheme
def test_lora_and_dora_start_as_the_quantized_base(scheme: str) -> None:
    bare = network()
    quantize_base(bare, scheme)
    for case in ("lora", "dora"):
        torch.testing.assert_close(logits(adapted(CASES[case], scheme, trained=False)), logits(bare), rtol=0, atol=1e-6)


@each_scheme
def test_gradients_pass_through_the_stored_weights(scheme: str) -> None:
    """As through dense layers that hold the same values, to 1e-5 of the largest."""
    stored, dense = adapted(LoRA(r=4), scheme), network()
    inject(dense, LoRA(r=4), seed=3)
    dense.load_state_dict({n: p for n, p in stored.state_dict().items() if ".adapters." in n}, strict=False)
    for path, layer in adapted_layers(dense).items():
        layer.base.weight.copy_(stored.get_submodule(f"{path}.base").weight)
    for model in (stored, dense):
        model(IDS, labels=IDS).loss.backward()
    for name, parameter in adapter_parameters(dense).items():
        same = adapter_parameters(stored)[name].grad
        torch.testing.assert_close(same, parameter.grad, rtol=0, atol=1e-5 * float(parameter.grad.abs().max()))


def test_loftq_starts_nearer_to_the_model_than_qlora_and_nearer_with_each_iteration() -> None:
    """The mean distance of weights, Q + s B A from W, in Frobenius norm over the layers."""

    def distance(settings: LoRA) -> float:
        model, exact = adapted(settings, "nf4", trained=False), network().state_dict()
        layers = adapted_layers(model).items()
        return sum(float((layer.merged()[0] - exact[f"{path}.weight"]).norm()) for path, layer in layers)

    distances = [distance(LoRA(r=8))]
    distances += [distance(LoRA(r=8, init="loftq", iterations=count)) for count in (1, 2, 3, 4, 5)]
    assert distances == sorted(distances, reverse=True)
    assert distances[1] < 0.9 * distances[0]


@each_scheme
@pytest.mark.parametrize("case", CASES)
def test_what_was_trained_is_loaded_again(case: str, scheme: str, tmp_path: Path) -> None:
    model = stored_base(tmp_path)
    trained = adapted(CASES[case], scheme, load(str(model)).network)
    expected = logits(trained)
    save_adapter(trained, tmp_path / "adapter", base_model=str(model), quantize_base=scheme)
    assert read_adapter(tmp_path / "adapter").quantize_base == scheme
    assert torch.equal(logits(load_adapted(str(model), tmp_path / "adapter").network), expected)


@each_scheme
@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_is_what_was_trained(case: str, scheme: str, tmp_path: Path) -> None:
    """To 1e-5: one product instead of two. The certificate loads both and says the same."""
    model = stored_base(tmp_path)
    trained = adapted(CASES[case], scheme, load(str(model)).network)
    expected = logits(trained)
    save_adapter(trained, tmp_path / "adapter", base_model=str(model), quantize_base=scheme)
    merged = merge_into(resolve(str(model)), tmp_path / "adapter", tmp_path / "merged", verify=True)
    torch.testing.assert_close(logits(load(str(merged.folder)).network), expected, rtol=0, atol=1e-5)
    assert merged.certificate is not None
    assert merged.certificate.kl < 1e-6
    merge_adapters(trained)
    torch.testing.assert_close(logits(trained), expected, rtol=0, atol=1e-5)


def test_the_certificate_compares_with_the_whole_base(tmp_path: Path) -> None:
    """PiSSA's start changes nothing: quantized or not, what it took is there with it and without it."""
    model = stored_base(tmp_path)
    started = adapted(CASES["pissa"], "nf4", load(str(model)).network, trained=False)
    save_adapter(started, tmp_path / "adapter", base_model=str(model), quantize_base="nf4")
    merged = merge_into(resolve(str(model)), tmp_path / "adapter", tmp_path / "merged", verify=True)
    assert merged.certificate is not None
    assert merged.certificate.kl_of_base < 1e-9


def test_switched_off_the_quantized_base_is_there() -> None:
    model, bare = adapted(LoRA(r=4), "nf4"), network()
    quantize_base(bare, "nf4")
    with adapters_off(model):
        assert torch.equal(logits(model), logits(bare))


@torch.no_grad()
@each_scheme
@pytest.mark.parametrize("case", FROM_THE_WEIGHT)
def test_switched_off_the_base_has_what_its_adapter_took(case: str, scheme: str) -> None:
    """Q(W - s R) + s R in each layer, which is formed here; to 1e-5, as one product instead of two."""
    model, whole = adapted(CASES[case], scheme), network()
    for path, layer in adapted_layers(model).items():
        (adapter,), dense = layer.adapters.values(), whole.get_submodule(path)
        taken = adapter.scale * adapter.taken_B @ adapter.taken_A
        dense.weight.copy_(round_trip(dense.weight - taken, scheme) + taken)
    with adapters_off(model):
        torch.testing.assert_close(logits(model), logits(whole), rtol=0, atol=1e-5)
    with assign_rows(model, [None, "default"]):
        torch.testing.assert_close(logits(model)[:1], logits(whole)[:1], rtol=0, atol=1e-5)
    activate(model)
    with adapters_merged(model):
        torch.testing.assert_close(logits(model), logits(whole), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("case", FROM_THE_WEIGHT)
def test_a_share_over_a_quantized_base_is_that_much_of_the_way_from_the_base(case: str) -> None:
    """To 1e-5 in each layer, applied and merged."""
    model = adapted(CASES[case], "nf4")
    for layer in adapted_layers(model).values():
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
        (adapter,) = layer.adapters.values()
        base = layer.base(x) + adapter.scale * x @ adapter.taken_A.T @ adapter.taken_B.T
        mix_adapters(model, {"default": 1.0})
        expected = base + 0.3 * (layer(x) - base)
        mix_adapters(model, {"default": 0.3})
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)
        with adapters_merged(model):
            torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_of_two_that_started_from_the_weight_one_alone_is_right() -> None:
    """Each layer without the other: Q(W - R1 - R2) + R2 + B1 A1, formed here."""
    model = network()
    for name in ("one", "two"):
        inject(model, LoRA(r=4, init="pissa", target_modules=("q_proj",)), seed=3, name=name)
    quantize_base(model, "nf4")
    activate(model, "one")
    for layer in adapted_layers(model).values():
        one, two = layer.adapters.values()
        weight = layer.base.weight + two.scale * two.taken_B @ two.taken_A + one.scale * one.lora_B @ one.lora_A
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(layer(x), x @ weight.T, rtol=0, atol=1e-5)
        with adapters_merged(model):
            torch.testing.assert_close(layer(x), x @ weight.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", FROM_THE_WEIGHT)
def test_an_adapter_stays_on_the_base_that_was_quantized_without_its_part(case: str) -> None:
    model = adapted(CASES[case], "nf4")
    before = logits(model)
    for call in (lambda: delete_adapter(model, "default"), lambda: remove_adapters(model)):
        with pytest.raises(AdapterError, match="quantized without what this adapter started from"):
            call()
    assert torch.equal(logits(model), before)
    delete_adapter(adapted(LoRA(r=4), "nf4"), "default")


def test_a_network_is_not_quantized_twice() -> None:
    model = adapted(LoRA(r=4), "nf4")
    with pytest.raises(ModelError, match="quantized already"):
        quantize_base(model, "nf4")


def stored_base(folder: Path) -> Path:
    """A tiny model in files, with a tokenizer."""

    place = folder / "base"
    network().save_pretrained(place)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", unk_token="w0").save_pretrained(place)
    return place


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells what a process maps")
def test_the_file_that_weights_were_mapped_from_is_let_go(tmp_path: Path, chat_model: Path) -> None:
    folder = shutil.copytree(chat_model, tmp_path / "model")
    model = load(str(folder), device="cpu")
    model.network.requires_grad_(False)

    def is_mapped() -> bool:
        return str(folder) in Path("/proc/self/maps").read_text()

    assert is_mapped()
    quantize_base(model.network, "int8")
    assert not is_mapped()
