"""Prefix tuning equals PEFT's in every kind of pass: padded, cached, in a stream, with checkpointed layers."""

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from luthier.adapters.inject import adapter_parameters, inject
from luthier.adapters.peft_format import load_adapter, save_adapter
from luthier.data.batches import collate
from luthier.data.examples import Origin
from luthier.data.sequences import TokenSequence
from luthier.errors import AdapterError, RecipeError
from luthier.models.attention import ATTENTION, register_attention
from luthier.models.recompute import checkpoint_layers
from luthier.models.score import score
from luthier.recipe.adapters import Prefix, Prompt

IDS = torch.arange(1, 25).view(2, 12)
LEFT_PADDED = torch.ones(2, 12, dtype=torch.long).index_put((torch.tensor([1]), torch.arange(5)), torch.tensor(0))
LENGTHS = (9, 2, 17, 6)
VIRTUAL = 5
GREEDY = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
NETWORKS = {
    "llama": {"num_key_value_heads": 2},
    "gpt_neox": {},  # all heads alike
    "mistral": {"num_key_value_heads": 2, "sliding_window": 8},  # shorter than prefix and text
    "cohere2": {"num_key_value_heads": 2},  # a window that is longer
    "opt": {"dropout": 0.0, "ffn_dim": 48, "word_embed_proj_dim": 32},  # learned positions, counted without padding
}


def network(name: str = "llama", attention: str = ATTENTION) -> PreTrainedModel:
    """Frozen, of random weights."""
    torch.manual_seed(0)
    register_attention()
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "tie_word_embeddings": False,
    }
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = AutoConfig.for_model(name, **sizes, **ends, num_attention_heads=4, **NETWORKS[name])
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval().requires_grad_(False)


def prefixed(name: str = "llama", **settings: int) -> PreTrainedModel:
    """With keys and values as large as the model's own, so that its effect is none of rounding."""
    model = network(name)
    inject(model, Prefix(num_virtual_tokens=VIRTUAL, init="random", **settings), seed=3)
    return model


def of_peft(model: PreTrainedModel, name: str = "llama", **settings: object) -> peft.PeftModel:
    """PEFT's model with the same prefix, or the same encoder."""
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, **settings)
    theirs = peft.get_peft_model(network(name, "sdpa"), config).eval()
    own = adapter_parameters(model)
    with torch.no_grad():
        for parameter, other in zip(own.values(), theirs.prompt_encoder.default.parameters(), strict=True):
            other.copy_(parameter)
    return theirs


def assert_gradients_agree(ours: PreTrainedModel, theirs: peft.PeftModel) -> None:
    """To 1e-5 of the largest: float32 sums of other order."""
    pairs = zip(adapter_parameters(ours).values(), theirs.prompt_encoder.default.parameters(), strict=True)
    for own, other in pairs:
        torch.testing.assert_close(own.grad, other.grad, rtol=0, atol=1e-5 * float(other.grad.abs().max()))


def sequences() -> list[TokenSequence]:
    draw = np.random.default_rng(0)
    ids = [draw.integers(97, size=n, dtype=np.int32) for n in LENGTHS]
    return [TokenSequence(each, draw.random(len(each)) < 0.5, Origin("rows", i)) for i, each in enumerate(ids)]


@pytest.mark.parametrize("mask", [None, LEFT_PADDED], ids=["whole", "left padded"])
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_and_gradients_equal_pefts(name: str, mask: Tensor | None) -> None:
    ours = prefixed(name)
    theirs = of_peft(ours, name)
    seen = torch.ones_like(IDS) if mask is None else mask
    found = ours(IDS, attention_mask=mask).logits[seen > 0]
    expected = theirs(input_ids=IDS, attention_mask=seen).logits[seen > 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for logits in (found, expected):
        logits.square().sum().backward()
    assert_gradients_agree(ours, theirs)


@pytest.mark.parametrize("every", [0, 1], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_stream_of_sequences_equals_pefts_of_each_alone(name: str, every: int) -> None:
    ours, rows = prefixed(name), sequences()
    checkpoint_layers(ours.train(), every)
    theirs, expected = of_peft(ours, name), []
    for row in rows:
        ids = torch.from_numpy(row.token_ids.astype(np.int64))
        logprobs = theirs(input_ids=ids[None]).logits[0].log_softmax(-1)
        trained = torch.from_numpy(row.trained[1:])
        expected.append(logprobs[:-1][trained].gather(-1, ids[1:][trained, None]).squeeze(-1))
    scores = score(ours, collate(rows))
    torch.testing.assert_close(scores.logprobs, torch.cat(expected), rtol=0, atol=1e-5)
    scores.logprobs.sum().backward()
    torch.cat(expected).sum().backward()
    assert_gradients_agree(ours, theirs)


def test_an_encoder_equals_pefts_and_is_saved_as_what_it_makes(tmp_path: Path) -> None:
    ours = prefixed(encoder_hidden_size=7)
    theirs = of_peft(ours, prefix_projection=True, encoder_hidden_size=7)
    found, expected = ours(IDS).logits, theirs(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for logits in (found, expected):
        logits.square().sum().backward()
    assert_gradients_agree(ours, theirs)
    save_adapter(ours, tmp_path / "ours", base_model="base")
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    for folder in ("ours", "theirs"):
        again = network()
        load_adapter(again, tmp_path / folder)
        assert [tuple(p.shape) for p in adapter_parameters(again).values()] == [(VIRTUAL, 2 * 2 * 2 * 8)]
        torch.testing.assert_close(again(IDS).logits, found, rtol=0, atol=1e-5)


def greedy(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Without a cache, the whole text again for every token."""
    for _ in range(int(GREEDY["max_new_tokens"])):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_generating_with_a_cache_equals_a_plain_loop(name: str, cache: str) -> None:
    model = prefixed(name)
    found = model.generate(IDS, attention_mask=torch.ones_like(IDS), cache_implementation=cache, **GREEDY)
    assert torch.equal(found, greedy(model, IDS))
    assert not torch.equal(found, greedy(network(name), IDS))


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_left_padded_row_generates_what_it_does_alone(name: str) -> None:
    model = prefixed(name)
    found = model.generate(IDS, attention_mask=LEFT_PADDED, **GREEDY)
    assert torch.equal(found[1:, 5:], greedy(model, IDS[1:, 5:]))


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_text_in_two_calls_with_a_cache_equals_one(name: str) -> None:
    model = prefixed(name)
    first = model(IDS[:, :7], use_cache=True)
    second = model(IDS[:, 7:], past_key_values=first.past_key_values, attention_mask=torch.ones_like(IDS))
    both = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(both, model(IDS).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_bfloat16_on_a_cpu_sees_the_prefix_too() -> None:
    """To 2^-8 of log-probabilities near 4.6, for 8 bits; the prefix changes them by ten times that."""
    wide, batch = prefixed(), collate(sequences())
    expected = score(wide, batch).logprobs
    narrow = prefixed()
    narrow.model.base.bfloat16()
    narrow.lm_head.bfloat16()
    found = score(narrow, batch).logprobs
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.018)
    assert (found - score(network(), batch).logprobs).abs().max() > 0.18


@pytest.mark.parametrize("name", NETWORKS)
def test_peft_loads_our_prefix_and_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    ours = prefixed(name)
    save_adapter(ours, tmp_path, base_model="base")
    theirs = peft.PeftModel.from_pretrained(network(name, "sdpa"), tmp_path)
    torch.testing.assert_close(theirs(input_ids=IDS).logits, ours(IDS).logits, rtol=0, atol=1e-5)


def test_we_load_a_prefix_of_pefts_and_save_it_bit_for_bit(tmp_path: Path) -> None:
    of_peft(prefixed()).save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours = network()
    load_adapter(ours, tmp_path / "theirs")
    assert torch.equal(ours(IDS).logits, prefixed()(IDS).logits)
    save_adapter(ours, tmp_path / "ours", base_model="base")
    again = network()
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(again(IDS).logits, ours(IDS).logits)


def test_the_configuration_says_what_pefts_says(tmp_path: Path) -> None:
    ours = prefixed()
    save_adapter(ours, tmp_path / "ours", base_model="base")
    of_peft(ours).save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    own, other = (json.loads((tmp_path / w / "adapter_config.json").read_text()) for w in ("ours", "theirs"))
    free = {"base_model_name_or_path"}
    assert {n: v for n, v in own.items() if n not in free} == {n: other[n] for n in own if n not in free}


@torch.no_grad()
def test_a_prefix_starts_as_the_models_own_keys_and_values_of_a_text() -> None:
    """So a text behind it is scored as behind these tokens."""
    model, tokens = network(), [5, 6, 7]
    inject(model, Prefix(num_virtual_tokens=3, init="text", init_text="a"), seed=0, encode={"a": tokens}.__getitem__)
    longer = torch.cat([torch.tensor(tokens).expand(2, -1), IDS], dim=1)
    torch.testing.assert_close(model(IDS).logits, network()(longer).logits[:, 3:], rtol=0, atol=1e-5)


@torch.no_grad()
def test_prefix_and_prompt_may_be_active_together() -> None:
    """The prompt's start, too, is behind a prefix that is the model's own of a text, whatever the order."""
    model, tokens = network(), {"a": [5, 6, 7], "b": [8, 9]}
    inject(model, Prompt(num_virtual_tokens=2, init="text", init_text="b"), seed=0, encode=tokens.__getitem__)
    inject(model, Prefix(num_virtual_tokens=3, init="text", init_text="a"), seed=0, name="2", encode=tokens.__getitem__)
    longer = torch.cat([torch.tensor([5, 6, 7, 8, 9]).expand(2, -1), IDS], dim=1)
    torch.testing.assert_close(model(IDS).logits, network()(longer).logits[:, 5:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [Prefix(), Prefix(encoder_hidden_size=4), Prompt(), Prompt(init="random")])
def test_the_plan_can_run_it_without_values(settings: Prefix | Prompt) -> None:
    """On tensors that have shapes alone."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = network()
        inject(model, settings, seed=0)
        scores = score(model, collate(sequences()))
        scores.logprobs.sum().backward()
    assert all(p.grad.shape == p.shape for p in adapter_parameters(model).values())


def test_attention_that_would_pass_over_the_prefix_is_refused() -> None:
    with pytest.raises(AdapterError, match="model: its layers run sdpa attention, which would pass over a prefix"):
        inject(network(attention="sdpa"), Prefix(), seed=0)
    model = prefixed()
    model.set_attn_implementation("eager")
    with pytest.raises(AdapterError, match="model: its layers run eager attention"):
        model(IDS)


def test_two_prefixes_at_once_are_refused() -> None:
    model = prefixed()
    inject(model, Prefix(num_virtual_tokens=2), seed=0, name="second")
    with pytest.raises(AdapterError, match="model: two prefixes are active at once"):
        model(IDS)


def test_an_encoder_starts_at_random_and_says_so() -> None:
    assert Prefix(encoder_hidden_size=8).init == "random"
    assert Prefix().init == "vocabulary"
    with pytest.raises(RecipeError, match="an encoder starts at random; leave init or encoder_hidden_size out"):
        Prefix(encoder_hidden_size=8, init="vocabulary")
