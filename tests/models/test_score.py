"""score() gives transformers' own log-probabilities, losses and gradients, whatever lies beside a sequence."""

from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from luthier.data.batches import collate
from luthier.data.examples import Origin
from luthier.data.sequences import TokenSequence
from luthier.models.attention import ATTENTION, RAGGED, register_attention, supports_ragged
from luthier.models.score import hidden_states, score

Factory = Callable[..., PreTrainedModel]

VOCABULARY = 97
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
LAYERS = ["sliding_attention", "full_attention"]
PACKED = {
    "llama": {},
    "llama_tied": {"tie_word_embeddings": True},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma3_text": {
        "sliding_window": 4,
        "layer_types": LAYERS,
        "query_pre_attn_scalar": 16,
        "tie_word_embeddings": True,
    },
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.4, "residual_multiplier": 0.7},
    "cohere": {"logit_scale": 0.3},
}
ONE_BY_ONE = {"gemma2": {"sliding_window": 4, "layer_types": LAYERS, "final_logit_softcapping": 2.0}}


def sequences(lengths: tuple[int, ...] = (9, 2, 17, 6), *, seed: int = 0) -> list[TokenSequence]:
    """Random tokens, of which about half are trained."""
    draw = np.random.default_rng(seed)
    return [
        TokenSequence(draw.integers(VOCABULARY, size=n, dtype=np.int32), draw.random(n) < 0.5, Origin("rows", i))
        for i, n in enumerate(lengths)
    ]


def tiny(network: Factory, name: str) -> PreTrainedModel:
    register_attention()
    built = network(name.removesuffix("_tied"), **SIZES, **(PACKED | ONE_BY_ONE)[name])
    built.set_attn_implementation(ATTENTION if supports_ragged(built.config) else "eager")
    return built


def logits(model: PreTrainedModel, one: TokenSequence) -> Tensor:
    """By transformers' own attention, with no cache and no neighbour."""
    ours = model.config._attn_implementation
    model.set_attn_implementation("eager")
    result: Tensor = model(torch.from_numpy(one.token_ids.astype(np.int64))[None], use_cache=False).logits[0]
    model.set_attn_implementation(ours)
    return result


@pytest.mark.parametrize("name", [*PACKED, *ONE_BY_ONE])
@torch.no_grad()
def test_scores_equal_transformers_own_logits(network: Factory, name: str) -> None:
    """To 1e-5: float32 sums of other order, over two layers."""
    model, rows = tiny(network, name), sequences()
    scores = score(model, collate(rows))
    expected_logprobs, expected_entropy = [], []
    for one in rows:
        logprobs = torch.log_softmax(logits(model, one), dim=-1)[:-1][torch.from_numpy(one.trained[1:])]
        targets = torch.from_numpy(one.token_ids[1:][one.trained[1:]].astype(np.int64))
        expected_logprobs.append(logprobs.gather(-1, targets[:, None]).squeeze(-1))
        expected_entropy.append(-(logprobs.exp() * logprobs).sum(-1))
    torch.testing.assert_close(scores.logprobs, torch.cat(expected_logprobs), rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.entropy, torch.cat(expected_entropy), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PACKED)
def test_bfloat16_scores_and_gradients_are_near_float32s(network: Factory, name: str) -> None:
    """Two layers round their inputs, products and sums to 8 bits, 2^-8 each time: 5% of the largest."""
    exact, rows = tiny(network, name), sequences()
    exact = exact.bfloat16().float()  # weights that both can hold
    narrow = deepcopy(exact).bfloat16()
    expected, found = (score(model, collate(rows)).logprobs for model in (exact, narrow))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * float(expected.detach().abs().max()))
    theirs, ours = (gradients(m, -logprobs.mean()) for m, logprobs in ((exact, expected), (narrow, found)))
    largest = max(float(g.abs().max()) for g in theirs.values())
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key].float(), gradient, rtol=0, atol=0.05 * largest, msg=key)


def padded(rows: list[TokenSequence]) -> dict[str, Tensor]:
    """What a trainer of transformers would be fed: right padding, labels of -100 where nothing is trained."""
    longest = max(map(len, rows))
    batch = {
        "input_ids": torch.zeros(len(rows), longest, dtype=torch.int64),
        "attention_mask": torch.zeros(len(rows), longest, dtype=torch.int64),
        "labels": torch.full((len(rows), longest), -100),
    }
    for i, one in enumerate(rows):
        ids, trained = torch.from_numpy(one.token_ids.astype(np.int64)), torch.from_numpy(one.trained)
        batch["input_ids"][i, : len(one)] = ids
        batch["attention_mask"][i, : len(one)] = 1
        batch["labels"][i, : len(one)] = torch.where(trained, ids, -100)
    return batch


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", [*PACKED, *ONE_BY_ONE])
def test_loss_and_gradients_equal_transformers_on_a_padded_batch(network: Factory, name: str) -> None:
    """Gradients to 1e-5 of the largest: float32 sums of other order."""
    model, rows = tiny(network, name), sequences()
    ours = -score(model, collate(rows)).logprobs.mean()
    found = gradients(model, ours)
    model.set_attn_implementation("eager")
    theirs = model(**padded(rows), use_cache=False).loss
    expected = gradients(model, theirs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=0, atol=1e-5 * largest, msg=key)


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_a_changed_neighbour_changes_no_logprob_of_the_others(network: Factory, name: str) -> None:
    """Exactly: rows of a matrix product do not mix, and attention runs sequence by sequence."""
    model, rows, other = tiny(network, name), sequences(), sequences(seed=1)
    before = collate(rows)
    swapped = TokenSequence(other[2].token_ids, rows[2].trained, rows[2].origin)
    after = collate([*rows[:2], swapped, *rows[3:]])
    same = before.target_sequence != 2
    assert torch.equal(score(model, before).logprobs[same], score(model, after).logprobs[same])
    assert not torch.equal(score(model, before).logprobs[~same], score(model, after).logprobs[~same])


@pytest.mark.parametrize("name", [*PACKED, *ONE_BY_ONE])
@torch.no_grad()
def test_packed_equals_one_by_one_in_any_order(network: Factory, name: str) -> None:
    """To 1e-5 and not exactly: a matrix product of another height may add up in another order."""
    model, rows = tiny(network, name), sequences()
    alone = [score(model, collate([one])).logprobs for one in rows]
    torch.testing.assert_close(score(model, collate(rows)).logprobs, torch.cat(alone), rtol=0, atol=1e-5)
    turned = score(model, collate(rows[::-1])).logprobs
    torch.testing.assert_close(turned, torch.cat(alone[::-1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", sorted(RAGGED))
@torch.no_grad()
def test_every_architecture_that_runs_packed_equals_its_own_attention(network: Factory, architecture: str) -> None:
    """One rounding of a larger stream in each of two layers: 1e-5 of the largest hidden state."""
    model, batch = network(architecture, **SIZES, sliding_window=4, pad_token_id=0), collate(sequences())
    register_attention()
    assert supports_ragged(model.config)
    model.set_attn_implementation("eager")
    alone = hidden_states(model, batch)
    model.set_attn_implementation(ATTENTION)
    assert model.config._attn_implementation == ATTENTION
    torch.testing.assert_close(hidden_states(model, batch), alone, rtol=0, atol=1e-5 * float(alone.abs().max()))


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {"attention_dropout": 0.1}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
        ("gemma2", {}),
        ("qwen3_next", {}),
        ("stablelm", {}),
    ],
    ids=str,
)
def test_what_a_ragged_stream_cannot_compute_is_left_to_transformers(
    architecture: str, settings: dict[str, object]
) -> None:
    assert not supports_ragged(AutoConfig.for_model(architecture, **settings))


@torch.no_grad()
def test_hidden_states_cover_every_token_of_the_stream(network: Factory) -> None:
    model, batch = tiny(network, "llama"), collate(sequences())
    assert hidden_states(model, batch).shape == (batch.num_tokens, SIZES["hidden_size"])


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_a_forward_pass_without_segments_is_transformers_own(network: Factory, name: str) -> None:
    """Whole, padded on the left, and in two pieces through a cache: what generation does."""
    model, ids = tiny(network, name), torch.from_numpy(sequences((24,))[0].token_ids.astype(np.int64))[None]
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    passes = [
        lambda: model(ids).logits,
        lambda: model(ids, attention_mask=mask).logits[:, 3:],
        lambda: model(ids[:, 10:], past_key_values=model(ids[:, :10], use_cache=True).past_key_values).logits,
    ]
    ours = [run() for run in passes]
    model.set_attn_implementation("eager")
    for one, run in zip(ours, passes, strict=True):
        torch.testing.assert_close(one, run(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PACKED)
def test_greedy_generation_is_transformers_own(network: Factory, name: str) -> None:
    model, ids = tiny(network, name), torch.from_numpy(sequences((12,))[0].token_ids.astype(np.int64))[None]
    ours = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    model.set_attn_implementation("eager")
    assert torch.equal(ours, model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0))
