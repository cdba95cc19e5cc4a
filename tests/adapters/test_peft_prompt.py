"""Prompt tuning equals PEFT's, leaves no trace of its positions, and generates what a plain loop would."""

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from luthier.adapters.inject import adapted_layers, adapter_parameters, inject
from luthier.adapters.peft_format import load_adapter, save_adapter
from luthier.data.batches import collate
from luthier.data.examples import Origin
from luthier.data.sequences import TokenSequence
from luthier.errors import AdapterError
from luthier.models.attention import ATTENTION, register_attention
from luthier.models.score import hidden_states, score
from luthier.recipe.adapters import Prompt

IDS = torch.arange(1, 25).view(2, 12)
LEFT_PADDED = torch.ones(2, 12, dtype=torch.long).index_put((torch.tensor([1]), torch.arange(5)), torch.tensor(0))
LENGTHS = (9, 2, 17, 6)
VIRTUAL = 5
GREEDY = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def network(attention: str = ATTENTION) -> LlamaForCausalLM:
    """Frozen, two query heads to a key head."""
    torch.manual_seed(0)
    register_attention()
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, attn_implementation=attention)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def windowed() -> MistralForCausalLM:
    """As `network`, a token sees itself and seven before it."""
    config = MistralConfig(**network().config.to_dict() | {"model_type": "mistral"}, sliding_window=8)
    config._attn_implementation = ATTENTION
    return MistralForCausalLM(config).eval().requires_grad_(False)


def prompted(model: PreTrainedModel | None = None) -> PreTrainedModel:
    """With a prompt of some size, so that its effect is none of rounding."""
    model = network() if model is None else model
    (adapter,) = inject(model, Prompt(num_virtual_tokens=VIRTUAL), seed=3)
    torch.nn.init.normal_(adapter.prompt_embeddings, std=0.5, generator=torch.Generator().manual_seed(1))
    return model


def of_peft(model: LlamaForCausalLM) -> peft.PeftModel:
    """PEFT's model with the same prompt."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)
    theirs = peft.get_peft_model(network("sdpa"), config).eval()
    (ours,) = adapter_parameters(model).values()
    with torch.no_grad():
        theirs.prompt_encoder.default.embedding.weight.copy_(ours)
    return theirs


def sequences() -> list[TokenSequence]:
    draw = np.random.default_rng(0)
    return [
        TokenSequence(draw.integers(97, size=n, dtype=np.int32), draw.random(n) < 0.5, Origin("rows", n))
        for n in LENGTHS
    ]


@pytest.mark.parametrize("mask", [None, LEFT_PADDED], ids=["whole", "left padded"])
def test_logits_and_gradients_equal_pefts(mask: Tensor | None) -> None:
    """To 1e-5, gradients of the largest: float32 sums of other order. PEFT's logits begin with the prompt's, and are
    those of each row alone: in a batch, PEFT leaves the padding between prompt and text.
    """
    ours = prompted()
    theirs = of_peft(ours)
    seen = torch.ones_like(IDS) if mask is None else mask
    texts = [row[tokens > 0][None] for row, tokens in zip(IDS, seen, strict=True)]
    expected = torch.cat([theirs(input_ids=text).logits[0, VIRTUAL:] for text in texts])
    found = ours(IDS, attention_mask=mask).logits[seen > 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for logits in (found, expected):
        logits.square().sum().backward()
    (parameter,) = adapter_parameters(ours).values()
    gradient = theirs.prompt_encoder.default.embedding.weight.grad
    torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()))


def test_a_stream_of_sequences_equals_pefts_of_each_alone() -> None:
    """In log-probabilities and in the gradient of their sum."""
    ours, rows = prompted(), sequences()
    theirs = of_peft(ours)
    expected = []
    for row in rows:
        ids = torch.from_numpy(row.token_ids.astype(np.int64))
        logprobs = theirs(input_ids=ids[None]).logits[0, VIRTUAL:].log_softmax(-1)
        trained = torch.from_numpy(row.trained[1:])
        expected.append(logprobs[:-1][trained].gather(-1, ids[1:][trained, None]).squeeze(-1))
    scores = score(ours, collate(rows))
    torch.testing.assert_close(scores.logprobs, torch.cat(expected), rtol=0, atol=1e-5)
    scores.logprobs.sum().backward()
    torch.cat(expected).sum().backward()
    (parameter,) = adapter_parameters(ours).values()
    gradient = theirs.prompt_encoder.default.embedding.weight.grad
    torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()))


def test_a_model_without_our_attention_is_scored_alike() -> None:
    model, batch = prompted(), collate(sequences())
    expected = hidden_states(model, batch)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(hidden_states(model, batch), expected, rtol=0, atol=1e-5)


def test_the_stream_is_a_multiple_of_32_long() -> None:
    """Whatever the number of sequences is: compiled products of a few sizes are met again."""
    model, seen = prompted(), []
    model.model.layers[0].register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].shape[1]))
    hidden = hidden_states(model, collate(sequences()))
    assert hidden.shape[0] == sum(LENGTHS)
    assert seen[0] % 32 == 0
    assert seen[0] >= sum(LENGTHS) + VIRTUAL * len(LENGTHS)


def greedy(model: PreTrainedModel, ids: Tensor, steps: int) -> Tensor:
    """Without a cache, the whole text again for every token."""
    for _ in range(steps):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("mask", [torch.ones_like(IDS), None], ids=["mask", "no mask"])
@torch.no_grad()
def test_generating_with_a_cache_equals_a_plain_loop(mask: Tensor | None) -> None:
    model = prompted()
    found = model.generate(IDS, attention_mask=mask, **GREEDY)
    assert torch.equal(found, greedy(model, IDS, 20))
    assert not torch.equal(found, greedy(network(), IDS, 20))


@torch.no_grad()
def test_a_left_padded_row_generates_what_it_does_alone() -> None:
    model, short = prompted(), IDS[1:, 5:]
    found = model.generate(IDS, attention_mask=LEFT_PADDED, **GREEDY)
    assert torch.equal(found[1:, 5:], greedy(model, short, 20))


@pytest.mark.parametrize("counted", [False, True], ids=["no positions", "positions"])
@torch.no_grad()
def test_a_left_padded_row_is_what_it_is_alone_where_a_window_ends_within_the_prompt(counted: bool) -> None:
    """Of twelve tokens and five of padding, those of the prompt within the window are as far from the text as alone."""
    model = prompted(windowed())
    positions = (LEFT_PADDED.cumsum(1) - 1).clamp(min=0) if counted else None
    found = model(IDS, attention_mask=LEFT_PADDED, position_ids=positions).logits
    torch.testing.assert_close(found[:1], model(IDS[:1]).logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1:, 5:], model(IDS[1:, 5:]).logits, rtol=0, atol=1e-5)
    generated = model.generate(IDS, attention_mask=LEFT_PADDED, **GREEDY)
    assert torch.equal(generated[1:, 5:], greedy(model, IDS[1:, 5:], 20))


@torch.no_grad()
def test_a_text_in_two_calls_with_a_cache_equals_one() -> None:
    model = prompted()
    first = model(IDS[:, :7], use_cache=True)
    second = model(IDS[:, 7:], past_key_values=first.past_key_values, attention_mask=torch.ones_like(IDS))
    both = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(both, model(IDS).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_hidden_states_are_those_of_the_text_alone() -> None:
    model = prompted()
    states = model(IDS, output_hidden_states=True).hidden_states
    assert {tuple(each.shape) for each in states} == {(2, 12, 32)}
    torch.testing.assert_close(model.lm_head(states[-1]), model(IDS).logits)


def test_peft_loads_our_prompt_and_gives_the_same_logits(tmp_path: Path) -> None:
    ours = prompted()
    save_adapter(ours, tmp_path, base_model="base")
    theirs = peft.PeftModel.from_pretrained(network("sdpa"), tmp_path)
    torch.testing.assert_close(theirs(IDS).logits[:, VIRTUAL:], ours(IDS).logits, rtol=0, atol=1e-5)


def test_we_load_a_prompt_of_pefts_and_save_it_bit_for_bit(tmp_path: Path) -> None:
    of_peft(prompted()).save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours = network()
    settings = load_adapter(ours, tmp_path / "theirs")
    assert settings.num_virtual_tokens == VIRTUAL
    torch.testing.assert_close(ours(IDS).logits, prompted()(IDS).logits, rtol=0, atol=0)
    save_adapter(ours, tmp_path / "ours", base_model="base")
    again = network()
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(*adapter_parameters(ours).values(), *adapter_parameters(again).values())


def start_of(settings: Prompt, *, text: dict[str, list[int]] | None = None) -> Tensor:
    model = network()
    (adapter,) = inject(model, settings, seed=3, encode=None if text is None else text.__getitem__)
    return adapter.prompt_embeddings.detach()


def test_a_prompt_starts_as_the_embeddings_of_tokens_or_as_wide_as_they_are() -> None:
    """A deviation of 3,200 draws is within 5% of that of 97 x 32 values, four times its error."""
    table = network().model.embed_tokens.weight
    sampled = start_of(Prompt(num_virtual_tokens=100, init="vocabulary"))
    assert all(any(torch.equal(row, each) for each in table) for row in sampled)
    drawn = start_of(Prompt(num_virtual_tokens=100, init="random"))
    assert float(drawn.std() / table.std()) == pytest.approx(1, rel=0.05)
    assert torch.equal(
        start_of(Prompt(num_virtual_tokens=5, init="text", init_text="a"), text={"a": [7, 8]}), table[[7, 8, 7, 8, 7]]
    )
    assert torch.equal(
        start_of(Prompt(num_virtual_tokens=1, init="text", init_text="a"), text={"a": [7, 8]}), table[[7]]
    )


def test_a_text_needs_a_tokenizer_that_makes_tokens_of_it() -> None:
    settings = Prompt(init="text", init_text="a")
    with pytest.raises(AdapterError, match="init: text needs the model's tokenizer"):
        start_of(settings)
    with pytest.raises(AdapterError, match='init_text: "a" has no tokens'):
        start_of(settings, text={"a": []})


@torch.no_grad()
def test_caches_without_room_for_the_prompt_are_refused() -> None:
    """Of fixed size; and filled by the model without its prompt."""
    model = prompted()
    with pytest.raises(AdapterError, match="model: a cache of fixed size has no room"):
        model.generate(IDS, cache_implementation="static", **GREEDY)
    cache = network()(IDS[:, :7], use_cache=True).past_key_values
    with pytest.raises(AdapterError, match="model: the cache does not hold the prompt"):
        model(IDS[:, 7:], past_key_values=cache, attention_mask=torch.ones_like(IDS))


@torch.no_grad()
def test_two_prompts_stand_one_before_the_other() -> None:
    model = prompted()
    inject(model, Prompt(num_virtual_tokens=2), seed=4, name="second")
    (carrier,) = adapted_layers(model).values()
    first, second = (carrier.adapters[name].prompt_embeddings.detach() for name in ("default", "second"))
    one = network()
    (adapter,) = inject(one, Prompt(num_virtual_tokens=VIRTUAL + 2), seed=0)
    adapter.prompt_embeddings.copy_(torch.cat([first, second]))
    torch.testing.assert_close(model(IDS).logits, one(IDS).logits, rtol=0, atol=1e-5)
    found, expected = (m.generate(IDS, attention_mask=torch.ones_like(IDS), **GREEDY) for m in (model, one))
    assert torch.equal(found, expected)
