"""Where only bytes are counted, loops leave out the turns that cannot count; the bytes are those of all turns."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from luthier.kernels import logprobs
from luthier.kernels.block_attention import block_attention
from luthier.kernels.logprobs import HeadOptions, linear_logprobs
from luthier.kernels.streams import Segments
from luthier.kernels.turns import counting_bytes, turns
from luthier.training.footprint import LiveBytes

PLACES = [(1, 9), (4, 2), (4, 2), (3, 2), (2, 9), (4, 1)]


def kept(of: torch.Tensor) -> list[tuple[int, int]]:
    return list(turns(PLACES, lambda place: place, over=of))


def test_only_the_largest_turns_remain_and_only_where_nothing_has_values() -> None:
    assert kept(torch.zeros(1)) == PLACES
    with counting_bytes():
        assert kept(torch.zeros(1)) == PLACES
    with FakeTensorMode():
        assert kept(torch.zeros(1)) == PLACES
        with counting_bytes():
            assert kept(torch.zeros(1)) == [(4, 2), (2, 9)]
        assert kept(torch.zeros(1)) == PLACES


def attention_bytes(segments: Segments, *, counting: bool) -> tuple[int, int]:
    with FakeTensorMode():
        query, key, value = (
            torch.zeros(heads, sum(segments.lengths), 8, dtype=torch.bfloat16, requires_grad=True)
            for heads in (4, 2, 2)
        )
        with LiveBytes() as counter, counting_bytes() if counting else nullcontext():
            block_attention(query, key, value, segments, 1.0).sum().backward()
        return counter.live, counter.peak


@st.composite
def segments(draw: st.DrawFn) -> Segments:
    """Up to six segments of up to three blocks; the first stands alone, others may go on from it."""
    lengths = draw(st.lists(st.integers(1, 300), min_size=1, max_size=6))
    parents = (None, *(draw(st.sampled_from([None, 0])) for _ in lengths[1:]))
    return Segments(tuple(lengths), parents)


@given(segments())
def test_attention_takes_at_most_what_its_largest_segments_take(segments: Segments) -> None:
    assert attention_bytes(segments, counting=True) == attention_bytes(segments, counting=False)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("num_rows", [1, 64, 200, 333])
def test_the_output_layer_takes_what_its_largest_chunk_takes(
    num_rows: int, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "CACHED_BYTES", 4 * 100 * 7)

    def head_bytes(*, counting: bool) -> tuple[int, int]:
        with FakeTensorMode():
            hidden = torch.zeros(num_rows, 16, requires_grad=True)
            weight = torch.zeros(100, 16, requires_grad=not frozen)
            targets = torch.zeros(num_rows, dtype=torch.long)
            with LiveBytes() as counter, counting_bytes() if counting else nullcontext():
                found, _ = linear_logprobs(hidden, weight, None, targets, HeadOptions(chunk_bytes=4 * 100 * 64))
                found.sum().backward()
            return counter.live, counter.peak

    assert head_bytes(counting=True) == head_bytes(counting=False)
