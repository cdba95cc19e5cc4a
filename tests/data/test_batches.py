"""Packing, collating and the order of the data: each token lies in one place, and a step needs no history."""

from collections import Counter
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.batches import StepPlan, TokenBatch, collate, cut, pack
from luthier.data.examples import Origin
from luthier.data.sequences import TokenSequence
from luthier.errors import DataError

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=40)
MASKS = st.lists(st.lists(st.booleans(), min_size=1, max_size=12), min_size=1, max_size=8)


def sequence(trained: list[bool], *, line: int = 1) -> TokenSequence:
    """Token i of line n is 100 n + i."""
    ids = 100 * line + np.arange(len(trained), dtype=np.int32)
    return TokenSequence(ids, np.asarray(trained, dtype=np.bool_), Origin("rows.jsonl", line))


def numbered(count: int) -> list[TokenSequence]:
    return [sequence([False, True], line=line) for line in range(count)]


def fewest_bins(lengths: list[int], capacity: int) -> int:
    """By trying all placements: the length at hand into each bin that has room, or into one more."""
    best = len(lengths)

    def place(rest: list[int], rooms: tuple[int, ...]) -> None:
        nonlocal best
        if len(rooms) >= best:
            return
        if not rest:
            best = len(rooms)
            return
        for i, room in enumerate(rooms):
            if rest[0] <= room and room not in rooms[:i]:
                place(rest[1:], (*rooms[:i], room - rest[0], *rooms[i + 1 :]))
        place(rest[1:], (*rooms, capacity - rest[0]))

    place(sorted(lengths, reverse=True), ())
    return best


@given(lengths=LENGTHS, capacity=st.integers(1, 80))
def test_every_index_is_packed_once_and_no_bin_overflows(lengths: list[int], capacity: int) -> None:
    """But for lengths above the capacity, which lie alone."""
    bins = pack(lengths, capacity)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in members) <= capacity or len(members) == 1 for members in bins)
    assert bins == sorted(sorted(members) for members in bins)


@given(lengths=LENGTHS)
def test_no_two_bins_would_fit_into_one(lengths: list[int]) -> None:
    """So all bins but one are more than half full on average: fewer than 2 sum / capacity + 1 of them."""
    bins = pack(lengths, 64)
    assert len(bins) < 2 * sum(lengths) / 64 + 1
    filled = sorted(sum(lengths[i] for i in members) for members in bins)
    assert len(filled) < 2 or filled[0] + filled[1] > 64


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=9))
def test_bins_are_within_eleven_ninths_of_the_fewest(lengths: list[int]) -> None:
    """First-fit-decreasing uses at most 11/9 OPT + 6/9 bins (Dosa 2007)."""
    assert len(pack(lengths, 20)) <= 11 / 9 * fewest_bins(lengths, 20) + 6 / 9


@given(masks=MASKS)
def test_collating_puts_each_token_where_its_sequence_says(masks: list[list[bool]]) -> None:
    sequences = [sequence(mask, line=i) for i, mask in enumerate(masks)]
    batch = collate(sequences)
    starts = [0, *accumulate(batch.segments.lengths)]
    assert batch.segments.lengths == tuple(len(s) for s in sequences)
    assert batch.num_tokens == sum(batch.segments.lengths)
    for start, one in zip(starts, sequences, strict=False):
        assert batch.token_ids[start : start + len(one)].tolist() == one.token_ids.tolist()
        assert batch.positions[start : start + len(one)].tolist() == list(range(len(one)))


@given(masks=MASKS)
def test_targets_are_the_trained_tokens_each_predicted_by_the_one_before(masks: list[list[bool]]) -> None:
    """Token 0 of a sequence is no target even where it is marked: nothing of its own sequence stands before it."""
    batch = collate([sequence(mask, line=i) for i, mask in enumerate(masks)])
    expected = [(i, 100 * i + t) for i, mask in enumerate(masks) for t in range(1, len(mask)) if mask[t]]
    assert list(zip(batch.target_sequence.tolist(), batch.target_ids.tolist(), strict=True)) == expected
    assert (batch.token_ids[batch.target_index] + 1).tolist() == batch.target_ids.tolist()
    assert batch.weights.tolist() == [1.0] * len(expected)
    assert (batch.count("tokens"), batch.count("sequences")) == (len(expected), len(masks))


def test_a_stream_has_the_types_that_models_index_with() -> None:
    batch = collate(numbered(2))
    integers = (batch.token_ids, batch.positions, batch.target_index, batch.target_ids, batch.target_sequence)
    assert {t.dtype for t in integers} == {torch.int64}
    assert batch.weights.dtype == torch.float32


def contents(batches: list[TokenBatch]) -> Counter[tuple[int, ...]]:
    return Counter(tuple(ids.tolist()) for b in batches for ids in b.token_ids.split(list(b.segments.lengths)))


@given(masks=MASKS, tokens=st.none() | st.integers(1, 30), packing=st.booleans())
def test_however_a_step_is_cut_it_holds_the_same_sequences(
    masks: list[list[bool]], tokens: int | None, packing: bool
) -> None:
    sequences = [sequence(mask, line=i) for i, mask in enumerate(masks)]
    batches = cut(sequences, tokens, packing=packing)
    assert contents(batches) == contents([collate(sequences)])
    assert sum(b.count("tokens") for b in batches) == sum(s.num_trained for s in sequences)
    if tokens is not None or not packing:
        assert all(b.num_tokens <= (tokens or 0) or len(b.segments.lengths) == 1 for b in batches)


@given(count=st.integers(1, 30), batch_size=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
def test_an_epoch_sees_every_sequence_once(count: int, batch_size: int, seed: int) -> None:
    plan = StepPlan(numbered(count), batch_size, epochs=2, seed=seed)
    assert plan.num_steps == 2 * plan.steps_per_epoch
    for epoch in range(2):
        steps = [plan.step(epoch * plan.steps_per_epoch + i) for i in range(plan.steps_per_epoch)]
        assert [len(s) for s in steps[:-1]] == [batch_size] * (len(steps) - 1)
        assert sorted(s.origin.line for step in steps for s in step) == list(range(count))


@given(asked=st.lists(st.integers(0, 11), max_size=6), index=st.integers(0, 11))
def test_a_step_does_not_depend_on_the_steps_asked_before(asked: list[int], index: int) -> None:
    fresh, used = (StepPlan(numbered(20), 5, epochs=3, seed=7) for _ in range(2))
    for other in asked:
        used.step(other)
    assert [s.origin for s in used.step(index)] == [s.origin for s in fresh.step(index)]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [
        [s.origin.line for s in StepPlan(numbered(50), 50, epochs=2, seed=seed).step(epoch)]
        for seed in (1, 2)
        for epoch in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_a_limit_ends_the_plan_within_an_epoch_and_never_lengthens_it() -> None:
    steps = [StepPlan(numbered(10), 4, epochs=2, seed=0, max_steps=limit).num_steps for limit in (None, 4, 100)]
    assert steps == [6, 4, 6]
    assert StepPlan(numbered(10), 4, epochs=2, seed=0).epoch_at(3) == 1.0


@pytest.mark.parametrize("sequences", [[], [sequence([False, False])], [sequence([True])]], ids=["none", "mask", "one"])
def test_data_without_a_trained_token_is_refused(sequences: list[TokenSequence]) -> None:
    with pytest.raises(DataError, match="no sequence has a trained token"):
        StepPlan(sequences, 4, epochs=1, seed=0)
