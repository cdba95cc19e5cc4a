"""Where only bytes are counted, loops leave out the turns that cannot count; the bytes are those of all turns."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from luthier.kernels import logprobs
from luthier.kernels.block_attention import block_attention
from luthier.kernels.logprobs import FurtherRows, HeadOptions, linear_logprobs
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


def attention_bytes(segments: Segments, dtype: torch.dtype, *, counting: bool) -> tuple[int, int]:
    """Of both passes, with query, key and value in the layout that a model's layer gives them."""
    with FakeTensorMode():
        query, key, value = (
            torch.zeros(sum(segments.lengths), heads, 8, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)
        )
        with LiveBytes() as counter, counting_bytes() if counting else nullcontext():
            layout = (part.transpose(0, 1) for part in (query, key, value))
            block_attention(*layout, segments, 1.0).sum().backward()
        return counter.live, counter.peak


@st.composite
def segments(draw: st.DrawFn) -> Segments:
    """Up to six segments of up to three blocks; the first stands alone, others may go on from it."""
    lengths = draw(st.lists(st.integers(1, 300), min_size=1, max_size=6))
    parents = (None, *(draw(st.sampled_from([None, 0])) for _ in lengths[1:]))
    return Segments(tuple(lengths), parents)


@given(segments(), st.sampled_from([torch.float32, torch.bfloat16]))
@example(Segments.alone((64, 63)), torch.float32)
@example(Segments.alone((127, 128)), torch.float32)
def test_attention_takes_at_most_what_its_largest_segments_take(segments: Segments, dtype: torch.dtype) -> None:
    expected = attention_bytes(segments, dtype, counting=False)
    assert attention_bytes(segments, dtype, counting=True) == expected


def test_a_count_of_bytes_takes_a_fraction_of_the_operations() -> None:
    """Of attention over 2,048 tokens, 16 blocks, one; of 300 rows of the output layer, 43 times 7, one."""
    assert operations(attention_bytes, Segments.alone((2048,)), torch.bfloat16) < 1 / 5
    assert operations(head_bytes, 300) < 1 / 5


def operations(work: Callable[..., object], *given: object) -> float:
    """How many of the operations of a count of all turns one of the largest takes."""
    few, all_of_them = _Operations(), _Operations()
    with few:
        work(*given, counting=True)
    with all_of_them:
        work(*given, counting=False)
    return few.count / all_of_them.count


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _few_rows_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CACHED_BYTES", 4 * 100 * 7)


def head_bytes(
    num_rows: int,
    *,
    counting: bool,
    frozen: bool = True,
    further: bool = False,
    entropy: bool = False,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[int, int]:
    """Of both passes over a vocabulary of 100, in chunks of 64 rows, 7 of them at a time."""
    options = HeadOptions(chunk_bytes=4 * 100 * 64, softcap=softcap)
    with FakeTensorMode():
        hidden = torch.zeros(num_rows, 16, dtype=dtype, requires_grad=True)
        weight = torch.zeros(100, 16, dtype=dtype, requires_grad=not frozen)
        targets = torch.zeros(num_rows, dtype=torch.long)
        rows = FurtherRows(torch.zeros(3, 16, dtype=dtype, requires_grad=True), (7, 100, 101)) if further else None
        with LiveBytes() as counter, counting_bytes() if counting else nullcontext():
            found, entropies = linear_logprobs(
                hidden, weight, None, targets, options, further=rows, entropy_gradient=entropy
            )
            (found.sum() + entropies.sum() if entropy else found.sum()).backward()
        return counter.live, counter.peak


@pytest.mark.parametrize(
    "more",
    [{}, {"frozen": False}, {"further": True}, {"entropy": True}, {"softcap": 30.0}, {"dtype": torch.bfloat16}],
    ids=str,
)
@pytest.mark.parametrize("num_rows", [1, 64, 200, 333])
def test_the_output_layer_takes_what_its_largest_chunk_takes(num_rows: int, more: dict[str, Any]) -> None:
    assert head_bytes(num_rows, counting=True, **more) == head_bytes(num_rows, counting=False, **more)
