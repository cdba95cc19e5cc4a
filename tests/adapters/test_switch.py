"""Several adapters on one model: each alone, mixed, taken off, and each for rows of its own."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from luthier.adapters.inject import adapted_layers, adapter_parameters, inject
from luthier.adapters.merge import adapters_merged
from luthier.adapters.switch import activate, adapter_names, adapters_off, assign_rows, delete_adapter, mix_adapters
from luthier.data.batches import collate
from luthier.data.examples import Origin
from luthier.data.sequences import TokenSequence
from luthier.errors import AdapterError
from luthier.models.attention import ATTENTION, register_attention
from luthier.models.score import score
from luthier.recipe.adapters import IA3, AnyAdapter, Bottleneck, DoRA, LoRA, Prompt

IDS = torch.arange(1, 37).view(3, 12)
KINDS: dict[str, AnyAdapter] = {
    "lora": LoRA(r=4),
    "dora": DoRA(r=2, target_modules=("q_proj", "up_proj")),
    "ia3": IA3(),
}


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, attention_bias=True)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def carrying(*names: str) -> LlamaForCausalLM:
    """A model with these of KINDS on it, as if trained; the same values however many there are."""
    model = base()
    for name in names:
        inject(model, KINDS[name], seed=1, name=name)
    perturb(model)
    return model


def perturb(model: nn.Module) -> None:
    for key, parameter in adapter_parameters(model).items():
        generator = torch.Generator().manual_seed(sum(key.encode()))
        with torch.no_grad():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    result: Tensor = model(ids).logits
    return result


def test_one_of_several_is_that_one_alone() -> None:
    model = carrying(*KINDS)
    assert adapter_names(model) == list(KINDS)
    for name in KINDS:
        activate(model, name)
        assert torch.equal(logits(model), logits(carrying(name)))
    activate(model)
    assert torch.equal(logits(model), logits(base()))


def test_a_share_is_that_much_of_the_effect_on_each_layer() -> None:
    model, share = carrying("dora"), 0.3
    whole = {path: layer.merged()[0] for path, layer in adapted_layers(model).items()}
    mix_adapters(model, {"dora": share})
    for path, layer in adapted_layers(model).items():
        expected = layer.base.weight + share * (whole[path] - layer.base.weight)
        torch.testing.assert_close(layer.merged()[0], expected, rtol=0, atol=1e-6)
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
        by_weight = nn.functional.linear(x, expected, layer.base.bias)
        torch.testing.assert_close(layer(x), by_weight, rtol=0, atol=1e-5)


def test_a_mixture_is_applied_as_it_is_merged() -> None:
    """To 1e-5: one product instead of several."""
    model = carrying(*KINDS)
    mix_adapters(model, {"ia3": 0.5, "lora": -0.2, "dora": 1.0})
    for layer in adapted_layers(model).values():
        weight, bias = layer.merged()
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, bias), rtol=0, atol=1e-5)


def test_each_row_of_a_batch_has_its_own_adapter() -> None:
    """To 1e-5 of what each row gives alone: products over fewer rows sum in another order."""
    model, names = carrying(*KINDS), ["dora", None, "lora"]
    with assign_rows(model, names):
        together = logits(model)
    for row, name in enumerate(names):
        activate(model, *([] if name is None else [name]))
        torch.testing.assert_close(together[row : row + 1], logits(model, IDS[row : row + 1]), rtol=0, atol=1e-5)


def test_sequences_of_one_stream_have_their_own_adapters() -> None:
    """To 1e-5 of what each sequence gives alone."""
    register_attention()
    model, sizes = carrying("lora", "ia3"), (9, 5, 12)
    model.set_attn_implementation(ATTENTION)
    draw = np.random.default_rng(0)
    rows = [
        TokenSequence(draw.integers(97, size=size, dtype=np.int32), np.arange(size) > 0, Origin("rows", i))
        for i, size in enumerate(sizes)
    ]
    with assign_rows(model, ["ia3", None, "lora"], lengths=sizes):
        together = score(model, collate(rows)).logprobs.split([size - 1 for size in sizes])
    for row, name, found in zip(rows, ("ia3", None, "lora"), together, strict=True):
        activate(model, *([] if name is None else [name]))
        torch.testing.assert_close(found, score(model, collate([row])).logprobs, rtol=0, atol=1e-5)


def test_rows_have_gradients_of_their_own_adapter_alone() -> None:
    model = carrying("lora", "ia3")
    with assign_rows(model, ["ia3", None, "ia3"]):
        model(IDS, labels=IDS).loss.backward()
    graded = {name for name, p in adapter_parameters(model).items() if p.grad is not None}
    assert graded == {name for name in adapter_parameters(model) if ".ia3." in name}


def test_a_deleted_adapter_is_gone_and_the_others_stay() -> None:
    model = carrying(*KINDS)
    delete_adapter(model, "lora")
    assert adapter_names(model) == ["dora", "ia3"]
    assert torch.equal(logits(model), logits(carrying("dora", "ia3")))
    delete_adapter(model, "dora")
    delete_adapter(model, "ia3")
    assert list(model.state_dict()) == list(base().state_dict())


def test_names_that_are_not_there_are_refused_with_the_nearest() -> None:
    model = carrying("lora", "ia3")
    for call in (lambda: activate(model, "lorra"), lambda: delete_adapter(model, "lorra")):
        with pytest.raises(AdapterError, match=r'unknown adapter.*did you mean "lora"'):
            call()
    with pytest.raises(AdapterError, match="the model carries no adapter"):
        activate(base(), "lora")


def test_adapters_of_sublayers_serve_whole_batches_wholly() -> None:
    model = carrying("lora")
    inject(model, Bottleneck(size=4), seed=0, name="wide")
    with pytest.raises(AdapterError, match="cannot serve single rows"), assign_rows(model, ["wide", "lora"]):
        pass
    with pytest.raises(AdapterError, match="its share can only be 1"):
        mix_adapters(model, {"wide": 0.5})


def test_an_adapter_that_changes_all_rows_is_switched_off_before_rows_are_assigned() -> None:
    for settings in (Prompt(num_virtual_tokens=2), LoRA(r=2, modules_to_save=("k_proj",), target_modules=("q_proj",))):
        model = base()
        inject(model, settings, seed=0, name="wide")
        with pytest.raises(AdapterError, match='"wide" is active and changes all rows'), assign_rows(model, [None]):
            pass
        activate(model)
        with assign_rows(model, [None] * 3):
            assert torch.equal(logits(model), logits(base()))


def test_rows_stand_where_layers_see_tokens_without_rows() -> None:
    """OPT's feed-forward layers are called with [rows * tokens, in]. To 1e-5 of each row alone."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "word_embed_proj_dim": 32}
    model = OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=4)).eval()
    for name in ("one", "two"):
        inject(model, LoRA(r=4, target_modules=("fc1", "fc2", "q_proj")), seed=1, name=name)
    perturb(model)
    names = ["two", "one", None]
    with assign_rows(model, names):
        together = logits(model)
    for row, name in enumerate(names):
        activate(model, *([] if name is None else [name]))
        torch.testing.assert_close(together[row : row + 1], logits(model, IDS[row : row + 1]), rtol=0, atol=1e-5)


def test_a_batch_of_one_row_may_have_its_adapter_assigned() -> None:
    model = carrying("lora", "ia3")
    with assign_rows(model, ["lora"]):
        assigned = logits(model, IDS[:1])
    activate(model, "lora")
    torch.testing.assert_close(assigned, logits(model, IDS[:1]), rtol=0, atol=0)


def test_rows_are_served_wholly_whatever_the_mixture_before() -> None:
    model = carrying("lora", "ia3")
    with assign_rows(model, ["lora", None, "ia3"]):
        wholly = logits(model)
    mix_adapters(model, {"lora": 0.3, "ia3": 0.5})
    mixed = logits(model)
    with assign_rows(model, ["lora", None, "ia3"]):
        assert torch.equal(logits(model), wholly)
    assert torch.equal(logits(model), mixed)


def test_other_numbers_of_rows_than_names_are_refused() -> None:
    model = carrying("lora")
    for names in (["lora", None], ["lora"] * 4, [None]):
        with assign_rows(model, names), pytest.raises(AdapterError, match="name an adapter, or None, for each row"):
            logits(model)
    for names, lengths in (([], None), (["lora"], [6, 6]), (["lora", None], [6])):
        with pytest.raises(AdapterError, match=f"{len(names)} names for"), assign_rows(model, names, lengths=lengths):
            pass
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    with assign_rows(model, ["lora", None], lengths=[20, 16]):
        assert layer(torch.zeros(1, 64, 32)).shape == (1, 64, 32)
        for shape in ((1, 35, 32), (1, 68, 32), (2, 36, 32)):
            with pytest.raises(AdapterError, match="36 tokens in one stream have adapters"):
                layer(torch.zeros(shape))


def test_what_applies_is_said_by_the_innermost_context_and_comes_back() -> None:
    model = carrying("lora", "ia3")
    on = logits(model)
    with assign_rows(model, ["lora", None, "ia3"]):
        outer = logits(model)
        with adapters_off(model):
            assert torch.equal(logits(model), logits(base()))
            with assign_rows(model, [None, "ia3", "ia3"]):
                inner = logits(model)
        with assign_rows(model, [None, "ia3", "ia3"]):
            assert torch.equal(logits(model), inner)
        assert torch.equal(logits(model), outer)
    assert torch.equal(logits(model), on)
    assert not torch.equal(inner, outer)


def test_nothing_is_switched_while_adapters_are_merged_or_rows_have_their_own() -> None:
    model = carrying("lora", "ia3")
    on = logits(model)
    with adapters_merged(model):
        for call in (lambda: activate(model), lambda: delete_adapter(model, "lora")):
            with pytest.raises(AdapterError, match="leave adapters_merged first"):
                call()
        for context in (adapters_off(model), assign_rows(model, ["lora"] * 3)):
            with pytest.raises(AdapterError, match="leave adapters_merged first"), context:
                pass
    with assign_rows(model, ["lora"] * 3):
        with pytest.raises(AdapterError, match="leave assign_rows first"), adapters_merged(model):
            pass
        with pytest.raises(AdapterError, match="leave assign_rows first"):
            activate(model, "ia3")
    assert torch.equal(logits(model), on)


def test_an_adapter_deleted_while_all_are_off_stays_away() -> None:
    model = carrying(*KINDS)
    with adapters_off(model):
        delete_adapter(model, "lora")
    assert torch.equal(logits(model), logits(carrying("dora", "ia3")))


@pytest.mark.parametrize("share", [float("nan"), float("inf"), -float("inf")])
def test_a_share_is_a_finite_number(share: float) -> None:
    with pytest.raises(AdapterError, match=f'share of the adapter "lora" is {share}'):
        mix_adapters(carrying("lora"), {"lora": share})


@torch.no_grad()
def test_an_adapter_is_put_around_a_module_that_another_trains_whole() -> None:
    """As on a model whose module has the trained weight. To 1e-5: the same sums in another order."""
    model, dense = base(), base()
    inject(model, LoRA(r=2, target_modules=("q_proj",), modules_to_save=("k_proj",)), seed=0, name="whole")
    inject(model, LoRA(r=4, target_modules=("k_proj",)), seed=1, name="around")
    perturb(model)
    for path, layer in adapted_layers(model).items():
        weight, bias = layer.merged()
        dense.get_submodule(path).weight.copy_(weight)
        dense.get_submodule(path).bias.copy_(bias)
    torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=1e-5)
    mix_adapters(model, {"whole": 1, "around": 0.5})
    with pytest.raises(AdapterError, match="its share can only be 1"):
        mix_adapters(model, {"whole": 0.5})
