"""What is known of each target stays with it, whatever is shared, cut in pieces or laid beside it."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.batches import collate, cut, pieces
from luthier.data.examples import Origin
from luthier.data.sequences import TokenGroup, TokenSequence

ANSWERS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=5)
GROUPS = st.lists(st.tuples(st.integers(1, 4), ANSWERS), min_size=1, max_size=4)


def answered(prompt: Sequence[int], answer: Sequence[int], *, name: str = "noted") -> TokenSequence:
    """Its column says of each target which token it is."""
    ids = np.array([*prompt, *answer], dtype=np.int32)
    learned = np.arange(len(ids)) >= len(prompt)
    return TokenSequence(ids, learned, Origin("a rollout", 1), {name: np.array(answer, dtype=np.float32)})


def group(length: int, answers: Sequence[Sequence[int]]) -> TokenGroup:
    return TokenGroup(tuple(answered([9] * length, answer) for answer in answers))


@given(GROUPS, st.integers(1, 40))
def test_a_column_lies_as_its_targets_do(groups: list[tuple[int, list[list[int]]]], most_tokens: int) -> None:
    """Also where answers begin alike, so that some targets lie in what they share."""
    for batch in cut([group(*one) for one in groups], most_tokens):
        assert torch.equal(batch.columns["noted"], batch.target_ids.float())
        assert batch.columns["noted"].dtype == torch.float32


@given(st.integers(1, 4), ANSWERS, st.integers(1, 40))
def test_pieces_hold_every_answer_once_and_fit(length: int, answers: list[list[int]], most_tokens: int) -> None:
    whole = group(length, answers)
    found = list(pieces(whole, most_tokens))
    assert [one for piece in found for one in piece.sequences] == list(whole.sequences)
    assert all(len(piece) <= most_tokens or len(piece.sequences) == 1 for piece in found)
    assert sum(collate([piece]).count("sequences") for piece in found) == len(answers)


def test_pieces_are_as_alike_as_can_be() -> None:
    """Eight answers of 9 tokens and a prompt of 4: seven would fit, and 7 + 1 takes more memory than 4 + 4."""
    whole = group(4, [[number] * 9 for number in range(8)])
    assert [len(piece.sequences) for piece in pieces(whole, 4 + 7 * 9)] == [4, 4]
    assert [len(piece.sequences) for piece in pieces(whole, 4 + 3 * 9)] == [3, 3, 2]


@given(st.integers(1, 4), ANSWERS)
def test_a_group_that_fits_is_not_cut(length: int, answers: list[list[int]]) -> None:
    whole = group(length, answers)
    assert len(list(pieces(whole, len(whole)))) == 1


def test_a_column_that_an_item_lacks_is_not_there() -> None:
    items = [answered([9], [1, 2]), answered([9], [3], name="other")]
    assert not collate(items).columns
    assert collate(items[:1]).columns.keys() == {"noted"}


def test_an_answer_that_teaches_nothing_has_an_empty_column() -> None:
    silent = TokenSequence(
        *(np.arange(4, dtype=np.int32), np.zeros(4, dtype=bool), Origin("a rollout", 1)),
        {"noted": np.zeros(0, dtype=np.float32)},
    )
    batch = collate([TokenGroup((answered([0, 1], [7]), silent, answered([0, 1], [5])))])
    assert batch.columns["noted"].tolist() == [7, 5]
    assert batch.target_sequence.tolist() == [0, 2]


def test_a_column_of_another_length_is_refused() -> None:
    with pytest.raises(AssertionError):
        TokenSequence(np.arange(3, dtype=np.int32), np.ones(3, dtype=bool), Origin("a", 1), {"noted": np.zeros(3)})


def test_columns_go_where_the_batch_goes() -> None:
    moved = collate([answered([9], [1, 2])]).to(torch.device("meta"))
    assert moved.columns["noted"].device.type == "meta"
