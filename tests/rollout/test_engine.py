"""Answers are those of transformers' own generation and of score(), whatever joins or leaves the batch."""

import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from luthier.adapters.inject import adapter_parameters, inject
from luthier.adapters.new_tokens import numbered, with_tokens
from luthier.data.batches import collate
from luthier.data.examples import Origin
from luthier.data.sequences import TokenSequence
from luthier.errors import ModelError, NetworkError, RecipeError
from luthier.kernels.decoding import Decoding
from luthier.models.attention import ATTENTION, register_attention, supports_ragged
from luthier.models.decode import can_decode
from luthier.models.load import Model, load
from luthier.models.score import score
from luthier.models.sources import ResolvedSource, resolve
from luthier.recipe.adapters import AnyAdapter, Bottleneck, DoRA, LoRA, Prefix
from luthier.rollout.engine import LocalEngine
from luthier.rollout.requests import Request, Sample, Sampling
from luthier.rollout.scoring import Failure

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LAYERS = ["sliding_attention", "full_attention"]
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma3_text": {"sliding_window": 4, "layer_types": LAYERS, "query_pre_attn_scalar": 16},
    "mistral": {"sliding_window": 4},
    "gpt_neox": {},
    "gemma2": {"sliding_window": 4, "layer_types": LAYERS, "query_pre_attn_scalar": 16},  # run by transformers
}
ALL = pytest.mark.parametrize("architecture", ARCHITECTURES)
BOTH = pytest.mark.parametrize("architecture", ["llama", "gemma2"])
LENGTHS = (5, 1, 17, 9, 40)
END = 257  # <|im_end|>
DRAWN = Sampling(max_new_tokens=12, temperature=1.0)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Of bytes."""
    backend = Tokenizer(
        models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=TEMPLATE)


def tiny(architecture: str = "llama", **settings: Any) -> Model:
    """Two layers of random weights, so large that answers differ by prompt; some of them end by themselves."""
    register_attention()
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = AutoConfig.for_model(architecture, **(ends | sizes | heads | ARCHITECTURES[architecture] | settings))
    network = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        scale = 0.05 if name.endswith("bias") else 0.5 if "norm" in name else 0.25
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    network.get_output_embeddings().weight[END] *= 3
    network.set_attn_implementation(ATTENTION if supports_ragged(config) else "eager")
    return Model(network, tokenizer(), ResolvedSource("tiny", "folder", Path()))


def requests(lengths: tuple[int, ...] = LENGTHS, *, counts: tuple[int, ...] | int = 1, seed: int = 0) -> list[Request]:
    draw = np.random.default_rng(7)
    each = counts if isinstance(counts, tuple) else (counts,) * len(lengths)
    prompts = [draw.integers(256, size=length, dtype=np.int32) for length in lengths]
    return [Request(p, n, seed + i) for i, (p, n) in enumerate(zip(prompts, each, strict=True))]


def sampled(
    model: Model, asked: list[Request], sampling: Sampling, *, weights: str = "dense", max_rows: int = 32
) -> list[Sample]:
    """All answers in one row; none may have failed."""
    found = LocalEngine(model, weights=weights, max_rows=max_rows).sample(asked, sampling)
    return [sample for some in found if not isinstance(some, Failure) for sample in some]


def ids(samples: list[Sample]) -> list[list[int]]:
    return [sample.token_ids.tolist() for sample in samples]


def generated(model: Model, request: Request, **given: Any) -> list[int]:
    """By transformers' own generation, from one prompt, with its own attention."""
    ours = model.network.config._attn_implementation
    if not any("Prefix" in type(module).__name__ for module in model.network.modules()):
        model.network.set_attn_implementation("eager")
    prompt = torch.from_numpy(request.prompt_ids.astype(np.int64))[None]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": END, "eos_token_id": END} | given
    answer = model.network.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    model.network.set_attn_implementation(ours)
    written: list[int] = answer[0, prompt.shape[1] :].tolist()
    return written


def logits_of(model: Model, request: Request, sample: Sample) -> torch.Tensor:
    """Of every token of the answer, by a plain forward pass over prompt and answer."""
    whole = torch.from_numpy(np.concatenate([request.prompt_ids, sample.token_ids]).astype(np.int64))[None]
    with torch.no_grad():
        logits: torch.Tensor = model.network(whole, use_cache=False).logits[0, len(request.prompt_ids) - 1 : -1]
    return logits


def test_which_of_these_networks_are_decoded() -> None:
    assert {name for name in ARCHITECTURES if not can_decode(tiny(name).network)} == {"gemma2"}


@ALL
@pytest.mark.parametrize(
    "settings", [{}, {"repetition_penalty": 1.4}, {"max_new_tokens": 1}], ids=["plain", "penalty", "one"]
)
def test_greedy_answers_are_transformers_own_token_for_token(architecture: str, settings: dict[str, Any]) -> None:
    model, asked = tiny(architecture), requests()
    expected = [generated(model, request, **settings) for request in asked]
    samples = sampled(model, asked, Sampling(**({"max_new_tokens": 12} | settings)))
    assert ids(samples) == expected
    assert len({tuple(one) for one in expected}) > 2
    assert [sample.finished for sample in samples] == [one[-1] == END for one in expected]


@BOTH
def test_answers_that_end_at_different_times_are_whole(architecture: str) -> None:
    """Two at a time, so that others take the places of those that end; the text is without what ended it."""
    model, asked = tiny(architecture), requests(tuple(range(1, 13)))
    expected = [generated(model, request, max_new_tokens=20) for request in asked]
    samples = sampled(model, asked, Sampling(max_new_tokens=20), max_rows=2)
    assert ids(samples) == expected
    assert len({len(one) for one in expected if one[-1] == END}) > 1
    assert any(one[-1] != END for one in expected)
    for sample in samples:
        spoken = sample.token_ids[: -1 if sample.finished else None]
        assert sample.text == model.tokenizer.decode(spoken.tolist()).strip()


@BOTH
def test_a_text_ends_an_answer_and_stands_in_it(architecture: str) -> None:
    """Two letters that one answer says one after the other, a letter of another, and what none says."""
    model, asked = tiny(architecture), requests(tuple(range(1, 25)))
    free = [model.tokenizer.decode(generated(model, request)) for request in asked]
    pair = next(found[0] for said in free if (found := re.search(r"(?<=.)([!-~])(?!\1)[!-~]", said)))
    single = next(found[0] for said in free if pair not in said and (found := re.search("(?<=..)[!-~]", said)))
    texts = (pair, single, "never said")
    asked = [request for request, said in zip(asked, free, strict=True) if pair in said or single in said][:4]
    expected = [generated(model, one, stop_strings=list(texts), tokenizer=model.tokenizer) for one in asked]
    samples = sampled(model, asked, Sampling(max_new_tokens=12, stop=texts))
    assert ids(samples) == expected
    assert {len(one) for one in expected} - {12}
    for sample in samples:
        assert sample.finished
        assert sample.token_ids[-1] == END or sample.text.endswith((pair, single))


@BOTH
def test_answers_of_a_group_that_end_by_a_text_have_no_token_behind_it(architecture: str) -> None:
    """While others of the group go on. The letter is the one that most of 16 answers say."""
    model, asked = tiny(architecture), requests((5,), counts=16)
    free = sampled(model, asked, DRAWN)
    text = max(map(chr, range(33, 127)), key=lambda letter: sum(letter in sample.text for sample in free))
    samples = sampled(model, asked, Sampling(12, 1.0, stop=(text,)))
    for one, sample in zip(free, samples, strict=True):
        letters = [model.tokenizer.decode([token]) for token in one.token_ids.tolist()]
        length = letters.index(text) + 1 if text in letters else len(letters)
        assert sample.token_ids.tolist() == one.token_ids[:length].tolist()
        np.testing.assert_allclose(sample.logprobs, one.logprobs[:length], rtol=0, atol=1e-4)
    assert sum(text in sample.text for sample in samples) > 1
    assert not all(text in sample.text for sample in samples)


@ALL
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_log_probabilities_are_those_of_score_and_of_plain_logits(architecture: str, temperature: float) -> None:
    """To 1e-4, for answers of many lengths in groups of 3. score() is at temperature 1."""
    model, asked = tiny(architecture), requests(counts=3)
    sampling = Sampling(max_new_tokens=12, temperature=temperature, top_p=0.95)
    samples = sampled(model, asked, sampling, max_rows=4)
    owners = [request for request in asked for _ in range(3)]
    for request, sample in zip(owners, samples, strict=True):
        expected = torch.log_softmax(logits_of(model, request, sample) / (temperature or 1), -1)
        own = expected.gather(-1, torch.from_numpy(sample.token_ids.astype(np.int64))[:, None]).squeeze(-1)
        np.testing.assert_allclose(sample.logprobs, own, rtol=0, atol=1e-4)
    if temperature != 0.7:
        found = np.concatenate([sample.logprobs for sample in samples])
        np.testing.assert_allclose(scored(model, owners, samples), found, rtol=0, atol=1e-4)


def scored(model: Model, owners: list[Request], samples: list[Sample]) -> np.ndarray[Any, Any]:
    sequences = []
    for request, sample in zip(owners, samples, strict=True):
        whole = np.concatenate([request.prompt_ids, sample.token_ids])
        sequences.append(TokenSequence(whole, np.arange(len(whole)) >= len(request.prompt_ids), Origin("rows", 0)))
    with torch.no_grad():
        return score(model, collate(sequences)).logprobs.numpy()


@ALL
def test_answers_do_not_depend_on_what_joins_and_leaves_the_batch(architecture: str) -> None:
    """Groups of 0 to 5 answers, 1, 2, 3 or all at a time, whole or each request by itself: the same tokens."""
    model, asked = tiny(architecture), requests((5, 1, 17, 9, 40, 3), counts=(5, 1, 0, 2, 3, 4))
    sampling = Sampling(max_new_tokens=12, temperature=0.9, min_p=0.01)
    expected = [sample for request in asked for sample in sampled(model, [request], sampling)]
    assert len(expected) == 15
    assert len({len(sample.token_ids) for sample in expected}) > 1
    for max_rows in (1, 2, 3, 32):
        samples = sampled(model, asked, sampling, max_rows=max_rows)
        assert ids(samples) == ids(expected)
        for one, other in zip(samples, expected, strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-4)
            assert (one.text, one.finished) == (other.text, other.finished)


@BOTH
def test_draws_belong_to_seed_and_place_and_touch_no_other_randomness(architecture: str) -> None:
    model, state = tiny(architecture), torch.get_rng_state()
    few, many = (sampled(model, requests((9,), counts=count), DRAWN) for count in (2, 6))
    assert ids(few) == ids(many)[:2]
    assert len({tuple(one) for one in ids(many)}) > 3
    turned = sampled(model, requests((9, 9), seed=-1)[::-1], DRAWN)
    assert ids(turned)[0] == ids(sampled(model, requests((9, 9), seed=-1), DRAWN))[1]
    again = sampled(model, requests((9,), counts=6), Sampling(12, 1.0, seed=43))
    others = sampled(model, requests((9,), counts=6, seed=1), DRAWN)
    assert not any(one in ids(many) for one in ids(again) + ids(others) if len(one) > 2)
    assert sum(len(one) > 2 for one in ids(again) + ids(others)) > 3
    assert torch.equal(torch.get_rng_state(), state)


def test_a_short_answer_begins_as_a_longer_one() -> None:
    model = tiny()
    short, long = (sampled(model, requests(), Sampling(n, 1.0)) for n in (4, 12))
    assert ids(short) == [one[:4] for one in ids(long)]


def adapted(settings: AnyAdapter | None, architecture: str = "llama", **given: Any) -> Model:
    """With an adapter as if trained."""
    model = tiny(architecture, **given)
    if settings is not None:
        model.tokenizer = with_tokens(model.tokenizer, settings.new_tokens)
        inject(model.network, numbered(settings, model.network, model.tokenizer), seed=0)
        for i, parameter in enumerate(adapter_parameters(model.network).values()):
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(i))
    return model


ADAPTERS = {
    "lora": LoRA(r=4),
    "dora": DoRA(r=4),
    "modules_to_save": LoRA(r=4, modules_to_save=("lm_head",)),
    "bottleneck": Bottleneck(size=4),
    "prefix": Prefix(num_virtual_tokens=3),
    "new_tokens": LoRA(r=4, new_tokens=("<think>", "</think>")),
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("weights", ["dense", "fp16"])
def test_the_adapted_model_answers_and_stays_as_it_was(name: str, weights: str) -> None:
    """Greedy, as transformers generates from it; float16's 11 bits change no choice here."""
    model, asked = adapted(ADAPTERS[name]), requests()
    expected, before = [generated(model, request) for request in asked], anatomy(model.network)
    assert expected != [generated(tiny(), request) for request in asked]
    assert ids(sampled(model, asked, Sampling(max_new_tokens=12), weights=weights)) == expected
    assert anatomy(model.network) == before


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_int8_answers_with_log_probabilities_of_what_it_computes(name: str) -> None:
    """Near the model's own, and not equal: within a tenth of a nat, half a step of 127 over two small layers."""
    model, asked = adapted(ADAPTERS[name]), requests(counts=4)
    samples = sampled(model, asked, DRAWN, weights="int8")
    owners = [request for request in asked for _ in range(4)]
    found, own = np.concatenate([sample.logprobs for sample in samples]), scored(model, owners, samples)
    assert 1e-4 < np.abs(found - own).max() < 0.3
    assert np.abs(found - own).mean() < 0.05


def anatomy(network: PreTrainedModel) -> list[tuple[Any, ...]]:
    """Every module and tensor by name and by what it is, with its values and mode."""
    found: list[tuple[Any, ...]] = [(n, id(m), m.training) for n, m in network.named_modules(remove_duplicate=False)]
    for name, tensor in (*network.named_parameters(remove_duplicate=False), *network.named_buffers()):
        found.append((name, id(tensor), tensor.requires_grad, tensor.is_inference(), tensor.detach().numpy().tobytes()))
    return [*found, id(network.generation_config), network.config.to_json_string()]


@pytest.mark.parametrize("weights", ["dense", "fp16", "int8"])
@pytest.mark.parametrize("name", [None, "lora", "dora", "bottleneck"])
def test_a_fault_in_the_middle_leaves_the_model_as_it_was(name: str | None, weights: str) -> None:
    """A network in training mode whose norm fails at the fourth call, in the middle of answers."""
    model = adapted(None if name is None else ADAPTERS[name])
    model.network.train()
    before, calls = anatomy(model.network), []

    def failing(*_: object) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyError("in the middle")

    hook = model.network.model.norm.register_forward_hook(failing)
    with pytest.raises(KeyError, match="in the middle"):
        sampled(model, requests(), Sampling(max_new_tokens=12), weights=weights)
    hook.remove()
    assert anatomy(model.network) == before


@pytest.mark.parametrize("weights", ["dense", "fp16"])
@pytest.mark.parametrize("name", ["lora", "dora"])
def test_training_goes_on_as_if_nothing_had_been_sampled(name: str, weights: str) -> None:
    """The gradients of the next step, bit for bit: no tensor of inference mode, no cached number is left behind."""
    gradients = []
    for first in (False, True):
        model = adapted(ADAPTERS[name])
        model.network.train()
        if first:
            sampled(model, requests(), DRAWN, weights=weights)
        prompt = torch.arange(1, 30)[None]
        model.network(prompt, labels=prompt, use_cache=False).loss.backward()
        gradients.append([p.grad for p in adapter_parameters(model.network).values()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_new_tokens_are_sampled() -> None:
    """Rows that an adapter adds behind the vocabulary, with the text that they were added for."""
    model, words = adapted(ADAPTERS["new_tokens"]), {258: "<think>", 259: "</think>"}
    samples = sampled(model, requests(counts=6), Sampling(max_new_tokens=20, temperature=2.0))
    saying = [(words[token], sample.text) for sample in samples for token in sample.token_ids if token in words]
    assert saying
    assert all(word in text for word, text in saying)


def test_prompts_without_room_fail_alone() -> None:
    """A context of 20 tokens, and prompts of 17, 19, 20 and 25, and one that is empty, beside one that has room."""
    model = tiny(max_position_embeddings=20)
    asked = [*requests((17, 19, 20, 25, 2)), Request(np.zeros(0, dtype=np.int32))]
    model.network.get_output_embeddings().weight[END] = 0  # no answer ends by itself
    found = LocalEngine(model).sample(asked, Sampling(max_new_tokens=8))
    reasons = [some.reason if isinstance(some, Failure) else len(some[0].token_ids) for some in found]
    assert reasons == [3, 1, "prompt too long", "prompt too long", 8, "prompt empty"]
    assert isinstance(found[2], Failure)
    assert found[2].detail == "20 tokens for a context of 20"
    alone = LocalEngine(model).sample(asked[:1], Sampling(max_new_tokens=8))[0]
    assert not isinstance(found[0], Failure)
    assert not isinstance(alone, Failure)
    assert found[0][0].token_ids.tolist() == alone[0].token_ids.tolist()


@BOTH
def test_nothing_asked_is_nothing_answered(architecture: str) -> None:
    engine = LocalEngine(tiny(architecture))
    assert engine.sample([], DRAWN) == []
    assert engine.sample(requests(counts=0), DRAWN) == [()] * len(LENGTHS)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"stop": ("a", "")},
    ],
    ids=str,
)
def test_a_sampling_that_leaves_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=f"^{next(iter(wrong))}: .* leaves nothing to sample"):
        LocalEngine(tiny()).sample(requests(), Sampling(**wrong))


def test_no_answers_at_once_are_refused() -> None:
    with pytest.raises(RecipeError, match="max_rows: 0 answers at once are none"):
        LocalEngine(tiny(), max_rows=0)


@BOTH
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_an_error(architecture: str, temperature: float) -> None:
    model = tiny(architecture)
    model.network.model.norm.weight[3] = torch.nan
    with pytest.raises(ModelError, match="logits are not numbers"):
        sampled(model, requests(), Sampling(4, temperature))


@contextmanager
def watched(model: Model) -> Iterator[list[dict[str, Any]]]:
    """What every step holds: bytes of answers' own keys and of prompts' keys, and the prompts themselves, weakly."""
    seen: list[dict[str, Any]] = []

    def watch(_: nn.Module, __: tuple[Any, ...], given: dict[str, Any]) -> None:
        step = given.get("decoding")
        if isinstance(step, Decoding):
            prompts = {id(pairs): pairs for _, pairs in step.prompts}
            tensors = [t for pairs in prompts.values() for pair in pairs.values() for t in pair]
            own = sum(room.nbytes for pair in step.own.layers.values() for room in pair)
            held = [weakref.ref(pairs[0][0]) for pairs in prompts.values()]
            seen.append({"own": own, "prompts": sum(t.nbytes for t in tensors), "held": held})

    hook = model.network.model.register_forward_pre_hook(watch, with_kwargs=True)
    yield seen
    hook.remove()


def test_memory_grows_with_the_group_by_the_answers_own_keys_alone() -> None:
    """Two layers of keys and values, two heads of eight numbers of four bytes: 256 bytes a token."""
    model, most = {}, 12
    for count in (1, 2, 8):
        network = tiny()
        network.network.get_output_embeddings().weight[END] = 0
        with watched(network) as seen:
            sampled(network, requests((40,), counts=count), Sampling(most, 1.0))
        assert {step["prompts"] for step in seen} == {40 * 256}
        model[count] = max(step["own"] for step in seen)
    assert model == {count: count * most * 256 for count in model}


def test_a_prompts_keys_are_let_go_when_its_last_answer_ends() -> None:
    """One prompt after the other, two rows at a time: never more than three of eight prompts are there."""
    model, asked = tiny(), requests((30,) * 8, counts=2)
    with watched(model) as seen:
        samples = sampled(model, asked, Sampling(20, 1.0), max_rows=2)
    assert len({len(sample.token_ids) for sample in samples}) > 3
    assert max(step["own"] for step in seen) == 2 * 20 * 256
    assert max(step["prompts"] for step in seen) <= 2 * 30 * 256
    assert not any(prompt() is not None for step in seen for prompt in step["held"])


def test_bfloat16_answers_are_near_score() -> None:
    """8 bits of mantissa over two layers: log-probabilities to a twentieth of a nat at the mean."""
    model, asked = tiny(), requests(counts=4)
    model.network.bfloat16()
    samples = sampled(model, asked, DRAWN)
    found, own = (
        np.concatenate([s.logprobs for s in samples]),
        scored(model, [r for r in asked for _ in range(4)], samples),
    )
    assert np.isfinite(found).all()
    assert np.abs(found - own).mean() < 0.05


@pytest.fixture(scope="module")
def smollm2() -> Model:
    try:
        resolve("smollm2-135m")
    except NetworkError as error:
        pytest.skip(str(error))
    return load("smollm2-135m")


@pytest.mark.parametrize("weights", ["dense", "fp16"])
def test_smollm2_answers_as_transformers_generates(smollm2: Model, weights: str) -> None:
    """The real model, greedy; with a prompt that stops early."""
    texts = [
        "<|im_start|>user\nWhat is 2+2? Say the number alone.<|im_end|>\n<|im_start|>assistant\n",
        "The capital of France is",
    ]
    asked = [Request(np.array(smollm2.tokenizer.encode(text), dtype=np.int32)) for text in texts]
    end = smollm2.tokenizer.eos_token_id
    expected = [generated(smollm2, request, max_new_tokens=8, eos_token_id=end) for request in asked]
    samples = sampled(smollm2, asked, Sampling(max_new_tokens=8), weights=weights)
    assert ids(samples) == expected
    found, own = np.concatenate([s.logprobs for s in samples]), scored(smollm2, asked, samples)
    np.testing.assert_allclose(found, own, rtol=0, atol=1e-4 if weights == "dense" else 0.02)
