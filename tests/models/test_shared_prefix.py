"""Sequences of a group, whose beginning is stored and computed once, give what each gives by itself."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from luthier.data.batches import TokenBatch, collate
from luthier.data.examples import Origin
from luthier.data.sequences import TokenGroup, TokenSequence
from luthier.models.attention import ATTENTION, register_attention
from luthier.models.fuse import fuse
from luthier.models.score import hidden_states, score

Factory = Callable[..., PreTrainedModel]

VOCABULARY = 97
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
LAYERS = ["sliding_attention", "full_attention"]
ARCHITECTURES = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 6, "layer_types": LAYERS, "query_pre_attn_scalar": 16},
    "gemma2": {"sliding_window": 4, "layer_types": LAYERS},  # one segment after the other
}


def group(prompt: int, answers: tuple[int, ...], seed: int = 0) -> TokenGroup:
    """Random tokens; each answer begins with a token of its own, and is trained."""
    draw = np.random.default_rng(seed)
    start = draw.integers(10, VOCABULARY, size=prompt, dtype=np.int32)
    made = []
    for number, length in enumerate(answers):
        own = draw.integers(10, VOCABULARY, size=length, dtype=np.int32)
        own[0] = number
        made.append(
            TokenSequence(np.concatenate([start, own]), np.arange(prompt + length) >= prompt, Origin("rows", 1))
        )
    return TokenGroup(tuple(made))


GROUPS = [group(11, (5, 3), 1), group(7, (4,), 2), group(9, (2, 6, 1), 3)]
UNSHARED = [sequence for each in GROUPS for sequence in each.sequences]


def tiny(network: Factory, name: str) -> PreTrainedModel:
    register_attention()
    built = network(name, **SIZES, **ARCHITECTURES[name]).double()
    built.set_attn_implementation("eager" if name == "gemma2" else ATTENTION)
    fuse(built)
    return built


def measured(model: PreTrainedModel, batch: TokenBatch) -> dict[str, torch.Tensor]:
    """Log-probabilities, last hidden states and the gradient of something that weighs every target differently."""
    model.zero_grad(set_to_none=True)
    logprobs = score(model, batch).logprobs
    (logprobs * torch.linspace(-1, 2, len(logprobs))).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        last = hidden_states(model, batch)[batch.last_index]
    return {"logprobs": logprobs.detach(), "last": last, **gradients}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shared_equals_unshared_in_values_and_gradients(network: Factory, name: str) -> None:
    """To 1e-6 in float64: only the order of sums differs, but layers of transformers' own compute in float32 inside."""
    model = tiny(network, name)
    shared, unshared = measured(model, collate(GROUPS)), measured(model, collate(UNSHARED))
    assert shared.keys() == unshared.keys()
    for key, expected in unshared.items():
        bound = 1e-6 * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(shared[key], expected, rtol=0, atol=bound, msg=lambda m, key=key: f"{key}: {m}")


def test_what_is_shared_is_in_the_stream_once() -> None:
    batch = collate(GROUPS)
    assert batch.num_tokens == 11 + 5 + 3 + 7 + 4 + 9 + 2 + 6 + 1 == sum(map(len, GROUPS))
    assert batch.segments.parents == (None, 0, 0, None, None, 4, 4, 4)
    assert (batch.count("sequences"), batch.count("pairs")) == (6, 4)
    assert batch.pairs.tolist() == [[0, 1], [3, 4], [3, 5], [4, 5]]


@given(prompt=st.integers(1, 6), answers=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_every_sequence_can_be_read_back_from_the_stream(prompt: int, answers: list[int], seed: int) -> None:
    given_group = group(prompt, tuple(answers), seed)
    batch = collate([GROUPS[0], given_group])
    slices, first = batch.segments.slices, 3  # of GROUPS[0]: the prompt and two answers
    for number, sequence in enumerate(given_group.sequences):
        alone = len(answers) == 1
        pieces = [slices[first]] if alone else [slices[first], slices[first + 1 + number]]
        ids = torch.cat([batch.token_ids[piece] for piece in pieces])
        assert ids.tolist() == sequence.token_ids.tolist()
        assert torch.cat([batch.positions[piece] for piece in pieces]).tolist() == list(range(len(sequence)))
        own = batch.target_sequence == 2 + number
        assert batch.target_ids[own].tolist() == sequence.token_ids[sequence.trained].tolist()
        before = batch.token_ids[batch.target_index[own]]
        assert before.tolist() == sequence.token_ids[np.flatnonzero(sequence.trained) - 1].tolist()
        assert batch.token_ids[batch.last_index[2 + number]] == sequence.token_ids[-1]


def test_scores_make_pairs_of_what_differs_and_margins_of_how_much() -> None:
    ranked = TokenGroup(GROUPS[2].sequences, scores=(3.0, 1.0, 1.0))
    batch = collate([ranked])
    assert batch.pairs.tolist() == [[0, 1], [0, 2]], "a tie is no pair"
    assert batch.margins.tolist() == [2.0, 2.0]


def test_feedback_carries_its_verdict_and_an_answer_to_another_prompt() -> None:
    one, other = GROUPS[1].sequences[0], GROUPS[0].sequences[0]
    rows = [
        TokenGroup((one,), desirable=flag, mismatched=other, reference=(-1.5,), mismatched_reference=-2.0)
        for flag in (True, False)
    ]
    batch = collate(rows)
    assert batch.desirable is not None
    assert batch.desirable.tolist() == [True, False]
    assert batch.reference is not None
    assert batch.reference.tolist() == [-1.5, -1.5]
    assert batch.mismatched is not None
    assert batch.mismatched.reference is not None
    assert batch.mismatched.token_ids.tolist() == 2 * other.token_ids.tolist()
    assert batch.mismatched.reference.tolist() == [-2.0, -2.0]
