"""Answers are those of transformers' own generation and of score(), whatever joins or leaves the batch."""

import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from luthier.data.batches import collate
from luthier.data.examples import Origin
from luthier.data.sequences import TokenSequence
from luthier.errors import MemoryPlanError, ModelError, NetworkError, RecipeError
from luthier.kernels.decoding import Decoding
from luthier.models.decode import can_decode
from luthier.models.load import Model, load
from luthier.models.score import score
from luthier.models.sources import resolve
from luthier.rollout.engine import LocalEngine
from luthier.rollout.requests import Request, Sample, Sampling
from luthier.rollout.scoring import Failure

Factory = Callable[..., Model]

ARCHITECTURES = ("llama", "qwen3", "gemma3_text", "mistral", "gpt_neox", "gemma2")  # transformers runs the last
ALL = pytest.mark.parametrize("architecture", ARCHITECTURES)
BOTH = pytest.mark.parametrize("architecture", ["llama", "gemma2"])
LENGTHS = (5, 1, 17, 9, 40)
END = 257  # <|im_end|>
DRAWN = Sampling(max_new_tokens=12, temperature=1.0)


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


def test_which_of_these_networks_are_decoded(tiny: Factory) -> None:
    assert {name for name in ARCHITECTURES if not can_decode(tiny(name).network)} == {"gemma2"}


@ALL
@pytest.mark.parametrize(
    "settings", [{}, {"repetition_penalty": 1.4}, {"max_new_tokens": 1}], ids=["plain", "penalty", "one"]
)
def test_greedy_answers_are_transformers_own_token_for_token(
    tiny: Factory, architecture: str, settings: dict[str, Any]
) -> None:
    model, asked = tiny(architecture), requests()
    expected = [generated(model, request, **settings) for request in asked]
    samples = sampled(model, asked, Sampling(**({"max_new_tokens": 12} | settings)))
    assert ids(samples) == expected
    assert len({tuple(one) for one in expected}) > 2
    assert [sample.finished for sample in samples] == [one[-1] == END for one in expected]


@BOTH
def test_answers_that_end_at_different_times_are_whole(tiny: Factory, architecture: str) -> None:
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
def test_a_text_ends_an_answer_and_stands_in_it(tiny: Factory, architecture: str) -> None:
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
def test_answers_of_a_group_that_end_by_a_text_have_no_token_behind_it(tiny: Factory, architecture: str) -> None:
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
def test_log_probabilities_are_those_of_score_and_of_plain_logits(
    tiny: Factory, architecture: str, temperature: float
) -> None:
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
def test_answers_do_not_depend_on_what_joins_and_leaves_the_batch(tiny: Factory, architecture: str) -> None:
    """Groups of 0 to 5 answers, 1, 2, 3 or all at a time, whole or each request by itself: the same tokens."""
    model, asked = tiny(architecture), requests((5, 1, 17, 9, 40, 3), counts=(5, 1, 0, 2, 3, 4))
    sampling = Sampling(max_new_tokens=8, temperature=0.9, min_p=0.01)
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
def test_draws_belong_to_seed_and_place_and_touch_no_other_randomness(tiny: Factory, architecture: str) -> None:
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


def test_a_short_answer_begins_as_a_longer_one(tiny: Factory) -> None:
    model = tiny()
    short, long = (sampled(model, requests(), Sampling(n, 1.0)) for n in (4, 12))
    assert ids(short) == [one[:4] for one in ids(long)]


def test_prompts_without_room_fail_alone(tiny: Factory) -> None:
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
def test_what_a_models_own_generation_settings_say_changes_nothing(tiny: Factory, architecture: str) -> None:
    """Hubs' models come with penalties, temperatures and ends of their own."""
    model, asked = tiny(architecture), requests()
    expected = ids(sampled(model, asked, Sampling(max_new_tokens=12)))
    said = max(expected, key=len)[1]
    own = GenerationConfig(repetition_penalty=9.0, no_repeat_ngram_size=1, eos_token_id=said, min_new_tokens=11)
    model.network.generation_config = own
    assert ids(sampled(model, asked, Sampling(max_new_tokens=12))) == expected
    assert model.network.generation_config is own


@BOTH
def test_nothing_asked_is_nothing_answered(tiny: Factory, architecture: str) -> None:
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
def test_a_sampling_that_leaves_nothing_is_refused(tiny: Factory, wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=f"^{next(iter(wrong))}: .* leaves nothing to sample"):
        LocalEngine(tiny()).sample(requests(), Sampling(**wrong))


def test_no_answers_at_once_are_refused(tiny: Factory) -> None:
    with pytest.raises(RecipeError, match="max_rows: 0 answers at once are none"):
        LocalEngine(tiny(), max_rows=0)


@BOTH
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_an_error(tiny: Factory, architecture: str, temperature: float) -> None:
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


def test_memory_grows_with_the_group_by_the_answers_own_keys_alone(tiny: Factory) -> None:
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


def test_where_memory_runs_out_fewer_answers_are_made_at_once(tiny: Factory) -> None:
    """A layer asks for more memory than there is as soon as over three answers go through it, a token each."""
    model, asked = tiny("gpt_neox"), requests((1,), counts=6)
    expected = ids(sampled(model, asked, DRAWN))
    engine, layer = LocalEngine(model, max_rows=6), model.network.get_submodule("gpt_neox.layers.1")

    def short(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        if given[0].numel() in {n * given[0].shape[-1] for n in (4, 5, 6)}:
            torch.empty(2**56)

    with layer.register_forward_pre_hook(short):
        (answers,) = engine.sample(asked, DRAWN)
        assert not isinstance(answers, Failure)
        assert ids(list(answers)) == expected
        assert engine.max_rows == 3
        engine.max_rows, module_of_one = 1, layer.register_forward_pre_hook(lambda module, given: torch.empty(2**56))
        with module_of_one, pytest.raises(MemoryPlanError, match="one answer in the making"):
            engine.sample(asked, DRAWN)


def test_a_prompts_keys_are_let_go_when_its_last_answer_ends(tiny: Factory) -> None:
    """One prompt after the other, two rows at a time: never more than three of eight prompts are there."""
    model, asked = tiny(), requests((30,) * 8, counts=2)
    with watched(model) as seen:
        samples = sampled(model, asked, Sampling(20, 1.0), max_rows=2)
    assert len({len(sample.token_ids) for sample in samples}) > 3
    assert max(step["own"] for step in seen) == 2 * 20 * 256
    assert max(step["prompts"] for step in seen) <= 2 * 30 * 256
    assert not any(prompt() is not None for step in seen for prompt in step["held"])


def test_bfloat16_answers_are_near_score(tiny: Factory) -> None:
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
def smollm2() -> tuple[Model, list[Request], list[list[int]]]:
    """The real model, two prompts, and what transformers generates from them; one answer ends by itself."""
    try:
        resolve("smollm2-135m")
    except NetworkError as error:
        pytest.skip(str(error))
    model = load("smollm2-135m")
    question = "<|im_start|>user\nSay the word yes.<|im_end|>\n<|im_start|>assistant\n"
    asked = [
        Request(np.array(model.tokenizer.encode(t), dtype=np.int32)) for t in (question, "The capital of France is")
    ]
    end = model.tokenizer.eos_token_id
    return model, asked, [generated(model, one, max_new_tokens=6, eos_token_id=end) for one in asked]


@pytest.mark.parametrize("weights", ["dense", "fp16"])
def test_smollm2_answers_as_transformers_generates(
    smollm2: tuple[Model, list[Request], list[list[int]]], weights: str
) -> None:
    """float16's 11 bits move no log-probability by more than a fiftieth of a nat."""
    model, asked, expected = smollm2
    samples = sampled(model, asked, Sampling(max_new_tokens=6), weights=weights)
    assert ids(samples) == expected
    found = np.concatenate([sample.logprobs for sample in samples])
    np.testing.assert_allclose(found, scored(model, asked, samples), rtol=0, atol=1e-4 if weights == "dense" else 0.02)
