"""What is put before each sequence of a stream can be taken out again, and its gradient is the sum over the places."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from luthier.kernels.streams import Segments, put_before_each, take_out


@st.composite
def cuts(draw: st.DrawFn) -> Segments:
    """Some sequences alone, some prompts with up to three answers."""
    lengths: list[int] = []
    parents: list[int | None] = []
    for answers in draw(st.lists(st.integers(0, 3), min_size=1, max_size=4)):
        parents += [None, *[len(lengths)] * answers]
        lengths += draw(st.lists(st.integers(1, 5), min_size=1 + answers, max_size=1 + answers))
    return Segments(tuple(lengths), tuple(parents))


@given(segments=cuts(), num_rows=st.integers(1, 4), num_behind=st.integers(0, 3), dim=st.integers(0, 2))
def test_taking_out_is_the_inverse_of_putting_before(
    segments: Segments, num_rows: int, num_behind: int, dim: int
) -> None:
    sizes = [2, 2, 2]
    sizes[dim] = sum(segments.lengths)
    stream = torch.arange(4 * sizes[dim]).view(sizes)
    rows = -torch.ones_like(stream.narrow(dim, 0, 1)).repeat_interleave(num_rows, dim)
    longer = put_before_each(rows, stream, segments, dim=dim, num_behind=num_behind)
    assert longer.shape[dim] == sizes[dim] + num_rows * segments.parents.count(None) + num_behind
    assert longer.shape[dim] - num_behind == sum(segments.longer_by(num_rows).lengths)
    assert torch.equal(take_out(longer, num_rows, segments, dim=dim), stream)
    first, last = longer.narrow(dim, 0, num_rows), longer.narrow(dim, longer.shape[dim] - num_behind, num_behind)
    assert torch.equal(first, rows)
    assert not last.any()


def test_rows_get_the_sum_of_the_gradients_of_their_places() -> None:
    rows, stream = torch.zeros(1, 2, requires_grad=True), torch.zeros(5, 2, requires_grad=True)
    longer = put_before_each(rows, stream, Segments.alone([2, 3]), dim=0)
    longer.backward(torch.arange(14.0).view(7, 2))
    assert torch.equal(rows.grad, torch.tensor([[0.0 + 6, 1 + 7]]))
    assert torch.equal(stream.grad[:, 0], torch.tensor([2.0, 4, 8, 10, 12]))
