"""Adapters of a model in memory: put on with the tokenizer and base that they need, or refused and nothing changed."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from click.testing import CliRunner
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

import luthier as lt
from luthier.adapters.inject import adapted_layers, adapter_parameters
from luthier.cli.generate import command
from luthier.errors import AdapterError, RecipeError
from luthier.models.adapted import load_adapted
from luthier.models.quantize import quantize_base, quantized_as
from luthier.pipeline.prepare import adapt
from luthier.recipe.adapters import AnyAdapter

TOKENS = ("<plan>", "of two")
SMALL = lt.LoRA(r=2)


@pytest.fixture(params=["no spare rows", "spare rows"])
def base(request: pytest.FixtureRequest, chat_model: Path, tmp_path: Path) -> str:
    """The tiny chat model, with as many rows as its tokenizer has tokens or eight more."""
    network = LlamaForCausalLM.from_pretrained(chat_model)
    if request.param == "spare rows":
        network.resize_token_embeddings(network.config.vocab_size + 8, mean_resizing=False)
    network.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(chat_model).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@torch.no_grad()
def logits(model: lt.Model, text: str = "say <plan> of two") -> Tensor:
    ids = torch.tensor([model.tokenizer(text).input_ids], device=model.device)
    result: Tensor = model.network(ids).logits
    return result


@torch.no_grad()
def move(model: lt.Model) -> None:
    """Changes every adapter, as training would."""
    for i, parameter in enumerate(adapter_parameters(model.network).values()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        parameter.add_(noise.to(parameter), alpha=0.05)


def trained(
    base: str, folder: Path, settings: AnyAdapter, *, scheme: str | None = None, dtype: Literal["bf16", "fp32"] = "fp32"
) -> tuple[lt.Model, Path]:
    """A model with a changed adapter over a base stored by the scheme, and the adapter's folder."""
    model = lt.load(base, dtype=dtype)
    adapt(model, settings, seed=0, scheme=scheme)
    if scheme:
        quantize_base(model.network, scheme)
    move(model)
    return model, lt.save_adapter(model, folder)


def test_new_tokens_are_read_saved_and_loaded(base: str, tmp_path: Path) -> None:
    model = lt.load(base)
    lt.add_adapter(model, lt.LoRA(r=2, new_tokens=TOKENS))
    move(model)
    first = len(lt.load(base).tokenizer)
    assert model.tokenizer.convert_tokens_to_ids(list(TOKENS)) == [first, first + 1]
    loaded = lt.load(base)
    settings = lt.load_adapter(loaded, lt.save_adapter(model, tmp_path / "adapter"))
    assert settings.trainable_token_indices == (first, first + 1)
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").get_vocab() == loaded.tokenizer.get_vocab()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


def test_other_new_tokens_are_refused_and_the_same_ones_shared(base: str, tmp_path: Path) -> None:
    folders = []
    for token in TOKENS:
        model = lt.load(base)
        lt.add_adapter(model, lt.LoRA(r=2, new_tokens=(token,)))
        folders.append(lt.save_adapter(model, tmp_path / token))
    model = lt.load(base)
    lt.load_adapter(model, folders[0])
    lt.load_adapter(model, folders[0], name="again")
    vocabulary = model.tokenizer.get_vocab()
    with pytest.raises(AdapterError, match=r'new_tokens: the adapter "default" has some already \(<plan>\)'):
        lt.load_adapter(model, folders[1], name="other")
    with pytest.raises(AdapterError, match=r'new_tokens: the adapter "default" has some already \(<plan>\)'):
        lt.add_adapter(model, lt.LoRA(r=2, new_tokens=("<else>",)), name="other")
    assert model.tokenizer.get_vocab() == vocabulary
    assert lt.adapter_names(model.network) == ["default", "again"]


def test_an_adapter_without_new_tokens_leaves_those_that_are_there(chat_model: Path, tmp_path: Path) -> None:
    """Though a tokenizer lies beside it, as many tools put one there."""
    _, folder = trained(str(chat_model), tmp_path / "plain", SMALL)
    AutoTokenizer.from_pretrained(chat_model).save_pretrained(folder)
    model = lt.load(str(chat_model))
    lt.add_adapter(model, lt.LoRA(r=2, new_tokens=TOKENS))
    lt.load_adapter(model, folder, name="plain")
    assert set(TOKENS) <= model.tokenizer.get_vocab().keys()


def test_a_prompts_text_is_encoded_as_it_stands(chat_model: Path) -> None:
    """Without the token that this tokenizer puts before every text, as in recipes."""
    model = lt.load(str(chat_model))
    begin = "<|im_start|>"
    processor = TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, model.tokenizer.encode(begin)[0])])
    model.tokenizer.backend_tokenizer.post_processor = processor
    assert len(model.tokenizer.encode("ab")) == 3
    lt.add_adapter(model, lt.Prompt(num_virtual_tokens=2, init="text", init_text="ab"))
    (prompt,) = adapter_parameters(model.network).values()
    ids = model.tokenizer.encode("ab", add_special_tokens=False)
    torch.testing.assert_close(prompt.detach(), model.network.get_input_embeddings().weight[ids].detach())


def test_a_failed_call_leaves_the_model_as_it_was(chat_model: Path) -> None:
    model = lt.load(str(chat_model))
    vocabulary = model.tokenizer.get_vocab()
    with pytest.raises(AdapterError, match="above the layer's size"):
        lt.add_adapter(model, lt.LoRA(r=1000, new_tokens=TOKENS))
    with pytest.raises(RecipeError, match="in the vocabulary already"):
        lt.add_adapter(model, lt.LoRA(r=2, new_tokens=("a",)))
    assert all(parameter.requires_grad for parameter in model.network.parameters())
    assert model.tokenizer.get_vocab() == vocabulary
    assert not adapted_layers(model.network)


def test_adapters_are_trained_and_the_base_is_not(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LoRA of rank 2 on query and value of two layers, [32, 32] and [16, 32]: 2 (64 + 48) numbers a layer."""
    settings = lt.LoRA(r=2, target_modules=("q_proj", "v_proj"))
    model, folder = trained(str(chat_model), tmp_path / "adapter", settings)
    lt.add_adapter(model, settings, name="second")
    loaded = lt.load(str(chat_model))
    lt.load_adapter(loaded, folder)
    for one, count in ((model, 2 * 448), (loaded, 448)):
        assert {n for n, p in one.network.named_parameters() if p.requires_grad} == set(adapter_parameters(one.network))
        lt.print_trainable_parameters(one)
        assert capsys.readouterr().out.startswith(f"trainable params: {count:,} ||")


@pytest.mark.parametrize("init", ["kaiming", "pissa", "loftq"])
def test_the_first_adapter_quantizes_the_model_that_it_was_trained_on(
    init: Literal["kaiming", "pissa", "loftq"], chat_model: Path, tmp_path: Path
) -> None:
    settings = lt.LoRA(r=2, init=init)
    model, folder = trained(str(chat_model), tmp_path / "adapter", settings, scheme="nf4", dtype="bf16")
    wide, narrow = lt.load(str(chat_model)), lt.load(str(chat_model), dtype="bf16")
    with pytest.raises(AdapterError, match="load the model with dtype bf16"):
        lt.load_adapter(wide, folder)
    assert quantized_as(wide.network) is None
    lt.load_adapter(narrow, folder)
    assert torch.equal(logits(narrow), logits(model))
    assert torch.equal(logits(load_adapted(str(chat_model), folder)), logits(model))


@pytest.mark.parametrize(
    ("there", "added", "init", "sentence"),
    [
        ("nf4", "int8", "kaiming", "a base that is int8, and this model's is nf4; load the model anew"),
        ("nf4", None, "kaiming", "a base that is dense, and this model's is nf4; load the model anew"),
        (None, "nf4", "kaiming", "a base that is nf4, and this model's is dense; load the model anew"),
        ("nf4", "nf4", "pissa", "starts with pissa stands alone, .*; load the model anew"),
        ("int8", "int8", "olora", "starts with olora stands alone, .*; load the model anew"),
        ("nf4", "nf4", "loftq", "starts with loftq stands alone, .*; load the model anew"),
    ],
)
def test_an_adapter_over_another_base_is_refused(
    there: str | None,
    added: str | None,
    init: Literal["kaiming", "loftq", "olora", "pissa"],
    sentence: str,
    chat_model: Path,
    tmp_path: Path,
) -> None:
    model, first = trained(str(chat_model), tmp_path / "first", SMALL, scheme=there)
    other, second = trained(str(chat_model), tmp_path / "second", lt.LoRA(r=2, init=init), scheme=added)
    before = logits(model)
    with pytest.raises(AdapterError, match=sentence):
        lt.load_adapter(model, second, name="second")
    with pytest.raises(AdapterError, match="load the model anew"):
        lt.load_adapter(other, first, name="first")
    assert torch.equal(logits(model), before)
    assert lt.adapter_names(model.network) == ["default"]


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_parts_of_quantized_weights_are_no_start(
    init: Literal["loftq", "olora", "pissa"], chat_model: Path, tmp_path: Path
) -> None:
    model, _ = trained(str(chat_model), tmp_path / "first", SMALL, scheme="nf4")
    with pytest.raises(AdapterError, match=f"starts with {init} stands alone, .*; load the model anew"):
        lt.add_adapter(model, lt.LoRA(r=2, init=init), name="second")
    lt.add_adapter(model, SMALL, name="second")
    assert lt.adapter_names(model.network) == ["default", "second"]


def test_an_adapter_of_one_quantized_base_stands_beside_another(chat_model: Path, tmp_path: Path) -> None:
    first, _ = trained(str(chat_model), tmp_path / "first", SMALL, scheme="nf4")
    second, folder = trained(str(chat_model), tmp_path / "second", lt.IA3(), scheme="nf4")
    lt.load_adapter(first, folder, name="second")
    lt.activate(first.network, "second")
    assert torch.equal(logits(first), logits(second))


def test_a_share_of_an_adapter_is_not_written_as_the_whole(chat_model: Path, tmp_path: Path) -> None:
    model, _ = trained(str(chat_model), tmp_path / "adapter", SMALL)
    lt.mix_adapters(model.network, {"default": 0.5})
    with pytest.raises(AdapterError, match=r"the adapter default, mixed by a share of 0\.5; activate it as a whole"):
        lt.save(model, tmp_path / "saved")
    lt.activate(model.network, "default")
    torch.testing.assert_close(logits(lt.load(str(lt.save(model, tmp_path / "saved")))), logits(model))


def test_an_adapter_for_another_model_is_refused_wherever_it_is_named(chat_model: Path, tmp_path: Path) -> None:
    _, folder = trained(str(chat_model), tmp_path / "adapter", SMALL)
    network = LlamaForCausalLM.from_pretrained(chat_model)
    network.get_input_embeddings().weight.data[0] += 1
    network.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(chat_model).save_pretrained(tmp_path / "other")
    other = lt.load(str(tmp_path / "other"))
    with pytest.raises(AdapterError, match="made for another model: the weights"):
        lt.load_adapter(other, folder)
    assert not adapted_layers(other.network)
    with pytest.raises(AdapterError, match="made for another model: the weights"):
        load_adapted(other.source.name, folder)
    arguments = ["1?", "--model", other.source.name, "--adapter", str(folder)]
    with pytest.raises(AdapterError, match="made for another model: the weights"):
        CliRunner().invoke(command("generate"), arguments, catch_exceptions=False)


def test_a_rank_is_chosen_and_merged_in_memory(chat_model: Path, tmp_path: Path) -> None:
    """To 1e-5 in float32: one product instead of two."""
    model, _ = trained(str(chat_model), tmp_path / "adapter", lt.DyLoRA(r=4))
    highest = logits(model)
    lt.set_rank(model.network, 2)
    expected = logits(model)
    assert not torch.allclose(expected, highest, atol=1e-4)
    assert lt.merge_adapters(model.network) == 14
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    assert not adapted_layers(model.network)
