"""New tokens: their rows alone are trained, in the embedding and the output layer, and every use of them agrees."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from luthier.adapters.inject import adapter_parameters, inject
from luthier.adapters.merge import merge_adapters
from luthier.adapters.new_tokens import further_rows
from luthier.adapters.peft_format import load_adapter, save_adapter
from luthier.adapters.switch import adapters_off, delete_adapter
from luthier.data.batches import collate
from luthier.data.examples import Origin
from luthier.data.sequences import TokenSequence
from luthier.errors import AdapterError, RecipeError
from luthier.models.attention import ATTENTION, register_attention
from luthier.models.score import score
from luthier.recipe.adapters import LoRA
from luthier.training.groups import decays

ROWS = 97
IDS = torch.tensor([[1, 97, 5, 98, 97, 7], [2, 3, 96, 98, 98, 4]])
NEW = LoRA(r=2, target_modules=("v_proj",), new_tokens=("<think>", "</think>"))
KNOWN = LoRA(r=2, target_modules=("v_proj",), trainable_token_indices=(96, 5))
DELTA = "base_model.model.{}.token_adapter.trainable_tokens_delta"


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def network(request: pytest.FixtureRequest) -> Callable[[], LlamaForCausalLM]:
    def build() -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(
            **{"vocab_size": ROWS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": request.param},
        )
        return LlamaForCausalLM(config).eval().requires_grad_(False)

    return build


def adapted(network: Callable[[], LlamaForCausalLM], settings: LoRA = NEW) -> LlamaForCausalLM:
    """As if trained."""
    model = network()
    inject(model, settings, seed=3)
    for i, parameter in enumerate(adapter_parameters(model).values()):
        nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(i))
    return model


def resized(network: Callable[[], LlamaForCausalLM], rows: int = ROWS + 2) -> LlamaForCausalLM:
    model = network()
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    result: Tensor = model(ids).logits
    return result


def test_new_rows_start_as_the_mean_and_old_logits_stay(network: Callable[[], LlamaForCausalLM]) -> None:
    model, base = network(), network()
    inject(model, NEW, seed=3)
    old = IDS.clamp(max=ROWS - 1)
    assert torch.equal(logits(model, old)[..., :ROWS], logits(base, old))
    mean = base.model.embed_tokens.weight.mean(0)
    torch.testing.assert_close(model.model.embed_tokens(torch.tensor([98])), mean[None], rtol=0, atol=1e-7)
    assert logits(model).shape[-1] == ROWS + 2


def test_tied_layers_train_one_tensor_and_untied_ones_two(network: Callable[[], LlamaForCausalLM]) -> None:
    model = adapted(network)
    rows = [p for name, p in adapter_parameters(model).items() if "trainable_tokens" in name]
    assert len(rows) == (1 if model.config.tie_word_embeddings else 2)
    assert all(p.shape == (2, 32) for p in rows)


def dense(model: LlamaForCausalLM, settings: LoRA, build: Callable[[], LlamaForCausalLM]) -> LlamaForCausalLM:
    """The same model with the rows in its own weights, and LoRA as it is."""
    whole = resized(build)
    inject(whole, settings.model_copy(update={"new_tokens": (), "trainable_token_indices": ()}), seed=3)
    lora = {name: p for name, p in adapter_parameters(model).items() if "lora" in name}
    whole.load_state_dict(lora, strict=False)
    for own, other in zip(layers(model), layers(whole), strict=True):
        adapter = own.adapters["default"]
        other.weight.data[list(adapter.indices)] = adapter.trainable_tokens_delta.detach()
        other.weight.requires_grad_()
    return whole


def layers(model: LlamaForCausalLM) -> list[nn.Module]:
    return [model.model.embed_tokens, model.lm_head]


@pytest.mark.parametrize("settings", [NEW, KNOWN], ids=["new", "known"])
def test_logits_and_gradients_are_those_of_a_model_with_the_rows_in_it(
    settings: LoRA, network: Callable[[], LlamaForCausalLM]
) -> None:
    """To 1e-5, for float32 sums of other order; where layers are tied, both uses of a row add up."""
    model = adapted(network, settings)
    num_columns, ids = (ROWS + 2, IDS) if settings is NEW else (ROWS, IDS.clamp(max=ROWS - 1))
    expected = dense(model, settings, network)
    losses = []
    for one in (model, expected):
        found = one(ids).logits[..., :num_columns]
        losses.append(nn.functional.cross_entropy(found.flatten(0, 1), ids.roll(-1, 1).flatten()))
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-5)
    for own, other in zip(layers(model), layers(expected), strict=True):
        adapter = own.adapters["default"]
        gradient = other.weight.grad[list(adapter.indices)]
        torch.testing.assert_close(adapter.trainable_tokens_delta.grad, gradient, rtol=0, atol=1e-6)
    for name, parameter in adapter_parameters(expected).items():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", [NEW, KNOWN], ids=["new", "known"])
@pytest.mark.parametrize("options", [{}, {"final_logit_softcapping": 2.0, "logit_scale": 0.5}], ids=["plain", "capped"])
def test_scores_are_those_of_a_model_with_the_rows_in_it(
    options: dict[str, float], settings: LoRA, network: Callable[[], LlamaForCausalLM]
) -> None:
    """Log-probabilities and entropies to 1e-5, gradients to 1e-5 of the largest: the frozen rows are never copied."""
    register_attention()

    def build() -> LlamaForCausalLM:
        made = network()
        made.set_attn_implementation(ATTENTION)
        for name, value in options.items():
            setattr(made.config, name, value)
        return made

    ids = (IDS if settings is NEW else IDS.clamp(max=ROWS - 1)).flatten().numpy().astype(np.int32)
    batch = collate([TokenSequence(ids, np.ones(len(ids), dtype=np.bool_), Origin("rows", 0))])
    model = adapted(build, settings)
    expected = dense(model, settings, build)
    if settings is KNOWN:  # the reference has two rows more, which nobody may see
        for parameter in {layer.weight for layer in layers(expected)}:
            parameter.data = parameter.data[:ROWS].clone()
    found = []
    for one in (model, expected):
        scores = score(one, batch)
        (scores.logprobs * torch.linspace(-1, 2, len(scores.logprobs))).sum().backward()
        found.append(scores)
    torch.testing.assert_close(found[0].logprobs, found[1].logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[0].entropy, found[1].entropy, rtol=0, atol=1e-5)
    for own, other in zip(layers(model), layers(expected), strict=True):
        adapter = own.adapters["default"]
        gradient = other.weight.grad[list(adapter.indices)]
        largest = float(gradient.abs().max())
        torch.testing.assert_close(adapter.trainable_tokens_delta.grad, gradient, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("settings", [NEW, KNOWN], ids=["new", "known"])
def test_gradients_reach_only_the_adapters_own_parameters(
    settings: LoRA, network: Callable[[], LlamaForCausalLM]
) -> None:
    model = adapted(network, settings)
    model(IDS if settings is NEW else IDS % ROWS).logits.square().mean().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == adapter_parameters(model).keys()


@pytest.mark.parametrize("settings", [NEW, KNOWN], ids=["new", "known"])
def test_off_is_the_base_and_deleting_gives_it_back(settings: LoRA, network: Callable[[], LlamaForCausalLM]) -> None:
    model, ids = adapted(network, settings), IDS % ROWS
    applied, base = logits(model, ids), logits(network(), ids)
    with adapters_off(model):
        assert torch.equal(logits(model, ids), base)
    assert torch.equal(logits(model, ids), applied)
    delete_adapter(model, "default")
    assert model.state_dict().keys() == network().state_dict().keys()
    assert torch.equal(logits(model, ids), base)


def test_two_adapters_with_tokens_apply_one_around_the_other(network: Callable[[], LlamaForCausalLM]) -> None:
    """Both have a row for 97; the later one's counts, in the embedding, the logits and the scores."""
    model, alone = adapted(network), adapted(network)
    inject(model, LoRA(r=2, target_modules=("v_proj",), new_tokens=("<a>",)), seed=0, name="second")
    for layer, base in zip(layers(alone), layers(network()), strict=True):
        layer.adapters["default"].trainable_tokens_delta.data[0] = base.weight.mean(0)
    torch.testing.assert_close(logits(model), logits(alone), rtol=0, atol=1e-6)
    found = further_rows(layers(model)[1])
    assert found is not None
    assert found.columns == (97, 98)
    torch.testing.assert_close(found.rows[0], network().lm_head.weight.mean(0), rtol=0, atol=1e-7)


@pytest.mark.parametrize("settings", [NEW, KNOWN], ids=["new", "known"])
def test_an_adapter_with_tokens_comes_back_bit_for_bit(
    settings: LoRA, network: Callable[[], LlamaForCausalLM], tmp_path: Path
) -> None:
    first, second = adapted(network, settings), network()
    save_adapter(first, tmp_path, base_model="base")
    loaded = load_adapter(second, tmp_path)
    assert loaded.new_tokens == settings.new_tokens
    assert loaded.trainable_token_indices == (settings.trainable_token_indices or (97, 98))
    for name, parameter in adapter_parameters(first).items():
        assert torch.equal(parameter, adapter_parameters(second)[name])
    assert torch.equal(logits(first, IDS % ROWS), logits(second, IDS % ROWS))


@pytest.mark.parametrize("settings", [NEW, KNOWN], ids=["new", "known"])
def test_peft_loads_our_tokens_and_gives_the_same_logits(
    settings: LoRA, network: Callable[[], LlamaForCausalLM], tmp_path: Path
) -> None:
    ours, ids = adapted(network, settings), IDS if settings is NEW else IDS % ROWS
    save_adapter(ours, tmp_path, base_model="base")
    theirs = peft.PeftModel.from_pretrained(resized(network) if settings is NEW else network(), tmp_path)
    torch.testing.assert_close(logits(theirs, ids), logits(ours, ids), rtol=0, atol=1e-5)
    tied = ours.config.tie_word_embeddings
    stored = {key for key in load_file(tmp_path / "adapter_model.safetensors") if "token" in key.split(".")[-1]}
    assert stored == {DELTA.format(name) for name in ("model.embed_tokens", "lm_head")[: 1 if tied else 2]}


@pytest.mark.parametrize("whole_layers", [False, True])
def test_we_load_pefts_tokens_and_give_the_same_logits(
    whole_layers: bool, network: Callable[[], LlamaForCausalLM], tmp_path: Path
) -> None:
    """PEFT writes the resized layers too where it finds that they are not the base's."""
    indices = {"embed_tokens": [98, 97], "lm_head": [98, 97]}
    config = peft.LoraConfig(r=2, target_modules=["v_proj"], trainable_token_indices=indices, init_lora_weights=False)
    theirs = peft.get_peft_model(resized(network), config).eval()
    for name, parameter in theirs.named_parameters():
        if "trainable_tokens_delta" in name:
            nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path, save_embedding_layers=whole_layers)
    ours = network()
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)


def test_known_tokens_that_peft_trains_in_the_embedding_alone_are_loaded_so(
    network: Callable[[], LlamaForCausalLM], tmp_path: Path
) -> None:
    config = peft.LoraConfig(r=2, target_modules=["v_proj"], trainable_token_indices=[96, 5], init_lora_weights=False)
    theirs, ids = peft.get_peft_model(network(), config).eval(), IDS % ROWS
    for name, parameter in theirs.named_parameters():
        if "trainable_tokens_delta" in name:
            nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours = network()
    load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), rtol=0, atol=1e-5)
    save_adapter(ours, tmp_path / "ours", base_model="base")
    again = peft.PeftModel.from_pretrained(network(), tmp_path / "ours")
    torch.testing.assert_close(logits(again, ids), logits(theirs, ids), rtol=0, atol=1e-5)


def test_tokens_that_differ_from_layer_to_layer_are_refused(
    network: Callable[[], LlamaForCausalLM], tmp_path: Path
) -> None:
    save_adapter(adapted(network), tmp_path, base_model="base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["trainable_token_indices"] = {"embed_tokens": [97, 98], "lm_head": [97]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="asks for other tokens in embed_tokens than in lm_head"):
        load_adapter(network(), tmp_path)


def test_tokens_of_a_longer_vocabulary_are_refused(network: Callable[[], LlamaForCausalLM], tmp_path: Path) -> None:
    """The rows between would have no values."""
    longer = lambda: resized(network)  # noqa: E731
    save_adapter(adapted(longer), tmp_path, base_model="base")
    with pytest.raises(AdapterError, match=r"embed_tokens: token 99 cannot be trained, for the model has 97 rows"):
        load_adapter(network(), tmp_path)


def test_merging_in_memory_is_refused_where_the_layers_have_no_room(network: Callable[[], LlamaForCausalLM]) -> None:
    model = adapted(network)
    before = logits(model)
    with pytest.raises(AdapterError, match="rows of new tokens cannot be merged in memory"):
        merge_adapters(model)
    assert torch.equal(logits(model), before)
    known = adapted(network, KNOWN)
    applied = logits(known, IDS % ROWS)
    merge_adapters(known)
    torch.testing.assert_close(logits(known, IDS % ROWS), applied, rtol=0, atol=1e-5)


def test_rows_of_a_scaled_embedding_are_scaled_too() -> None:
    """Gemma multiplies what it looks up by the root of the hidden size."""
    sizes = {"vocab_size": ROWS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    config = Gemma3TextConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = Gemma3ForCausalLM(config).eval().requires_grad_(False)
    inject(model, NEW, seed=0)
    embedded = model.model.embed_tokens(torch.tensor([97]))
    mean = model.model.embed_tokens.weight.mean(0) * 32**0.5
    torch.testing.assert_close(embedded[0], mean, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"new_tokens": ("<a>", "")}, "new_tokens[1]: expected text that is not empty"),
        ({"new_tokens": ("<a>", "<b>", "<a>")}, 'new_tokens: "<a>" stands there twice; leave one out'),
        ({"trainable_token_indices": (5, 5)}, "trainable_token_indices: 5 stands there twice"),
        ({"trainable_token_indices": (-1,)}, "trainable_token_indices[0]: expected at least 0"),
        ({"new_tokens": ("<a>",), "trainable_token_indices": (5, 6)}, "are not as many as new_tokens; leave it out"),
    ],
)
def test_wrong_tokens_are_one_sentence(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(sentence)):
        LoRA(**fields)


def test_a_token_and_a_whole_layer_are_not_trained_at_once(network: Callable[[], LlamaForCausalLM]) -> None:
    settings = NEW.model_copy(update={"modules_to_save": ("lm_head",)})
    with pytest.raises(AdapterError, match=r"lm_head (carries the adapter already|shares its weight with)"):
        inject(network(), settings, seed=0)


def test_a_number_that_is_no_token_is_refused(network: Callable[[], LlamaForCausalLM]) -> None:
    with pytest.raises(AdapterError, match="97 is no token of the model, which has 97; name tokens that are to be"):
        inject(network(), LoRA(r=2, trainable_token_indices=(5, 97)), seed=0)


def test_weight_decay_spares_rows_as_it_spares_embeddings(network: Callable[[], LlamaForCausalLM]) -> None:
    decaying = decays(adapted(network))
    assert {name for name, decay in decaying.items() if decay} == {name for name in decaying if "lora" in name}
