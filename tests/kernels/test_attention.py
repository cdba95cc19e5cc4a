"""Attention over a stream is attention of each sequence by itself, in value and in gradient, on every path."""

import pytest
import torch
from torch import Tensor

from luthier.kernels.attention import put_prefix, ragged_attention
from luthier.kernels.block_attention import BLOCK_QUERIES
from luthier.kernels.streams import Segments, put_before_each, take_out

HEADS, KEY_HEADS, SIZE = 4, 2, 8
SCALE = SIZE**-0.5
LENGTHS = (1, 9, 3, 17)
ALONE = Segments.alone(LENGTHS)
SHARED = Segments((6, 7, 1, 4, 9, 3), (None, 0, 0, None, 3, 3))  # two prompts with two answers each, 30 tokens too
APART = Segments((6, 7, 4, 1, 9, 3), (None, 0, None, 2, 0, 2))  # answers to one prompt that do not lie side by side
CUTS = pytest.mark.parametrize("segments", [ALONE, SHARED, APART], ids=["alone", "shared", "apart"])
PATHS = [(torch.float64, None), (torch.float32, None), (torch.bfloat16, None), (torch.float32, 4), (torch.bfloat16, 4)]

# of the largest entry. float32: sums of 30 products; bfloat16: scores, weights and sums rounded to 8 bits, 2^-8 each
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def leaves(dtype: torch.dtype, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """Query, key and value."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(lengths), SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def plain_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments, window: int | None) -> Tensor:
    """With one mask over the whole stream: same sequence, not later, and within the window."""
    key, value = (t.repeat_interleave(HEADS // KEY_HEADS, dim=1) for t in (key, value))
    tokens = [(i, place) for i, cut in enumerate(segments.slices) for place in range(cut.start, cut.stop)]
    seen = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for i, place in tokens:
        own, parent = segments.slices[i], segments.parents[i]
        before = [] if parent is None else list(range(segments.slices[parent].start, segments.slices[parent].stop))
        visible = [*before, *range(own.start, place + 1)]
        seen[place, visible[-(window or len(tokens)) :]] = True
    scores = (query @ key.transpose(-1, -2) * SCALE).masked_fill(~seen, -torch.inf)
    return torch.softmax(scores, dim=-1) @ value


@CUTS
@pytest.mark.parametrize(("dtype", "window"), PATHS, ids=str)
def test_every_path_equals_one_masked_softmax_in_float64(
    dtype: torch.dtype, window: int | None, segments: Segments
) -> None:
    ours = leaves(dtype)
    exact = [t.detach().double().requires_grad_() for t in ours]
    attended = ragged_attention(*ours, segments, scale=SCALE, window=window)
    expected = plain_attention(*exact, segments, window)
    assert attended.dtype == dtype
    attended.double().square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip((attended, *(t.grad for t in ours)), (expected, *(t.grad for t in exact)), strict=True):
        bound = TOLERANCE[dtype] * float(other.detach().abs().max())
        torch.testing.assert_close(one.double(), other, rtol=0, atol=bound)


@CUTS
def test_key_heads_written_out_for_more_threads_change_no_gradient(
    segments: Segments, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four threads have nothing to do for two of them where two key heads are all that the work is cut into."""
    grads = []
    for threads in (1, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        ours = leaves(torch.float64)
        ragged_attention(*ours, segments, scale=SCALE).square().sum().backward()
        grads.append([t.grad for t in ours])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


@pytest.mark.parametrize("parents", [(None, None, None), (None, 0, 0)], ids=["alone", "shared"])
def test_bfloat16_sequences_of_several_blocks_agree_as_well(parents: tuple[int | None, ...]) -> None:
    segments = Segments((2 * BLOCK_QUERIES + 40, BLOCK_QUERIES, BLOCK_QUERIES + 3), parents)
    ours = leaves(torch.bfloat16, segments.lengths)
    exact = [t.detach().double().requires_grad_() for t in ours]
    attended = ragged_attention(*ours, segments, scale=SCALE)
    expected = plain_attention(*exact, segments, None)
    attended.double().square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip((attended, *(t.grad for t in ours)), (expected, *(t.grad for t in exact)), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=2e-2 * float(other.detach().abs().max()))


def test_large_scores_lose_nothing_in_bfloat16() -> None:
    """Scores near 200, as keys with a bias have them; rounded to 8 bits they would be off by half a nat."""
    query, key, value = (t.detach() for t in leaves(torch.bfloat16))
    query = query * 64
    expected = plain_attention(query.double(), key.double(), value.double(), ALONE, None)
    attended = ragged_attention(query, key, value, ALONE, scale=SCALE)
    torch.testing.assert_close(attended.double(), expected, rtol=0, atol=2e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_changed_neighbour_changes_no_bit_of_the_others(dtype: torch.dtype) -> None:
    """Each sequence is a computation of its own, so equality is exact."""
    with torch.no_grad():
        before = ragged_attention(*leaves(dtype), ALONE, scale=SCALE)
        changed = leaves(dtype)
        for t in changed:
            t[:, :, 1:10] += 3
        after = ragged_attention(*changed, ALONE, scale=SCALE)
    assert torch.equal(before[:, :, :1], after[:, :, :1])
    assert torch.equal(before[:, :, 10:], after[:, :, 10:])
    assert not torch.equal(before[:, :, 1:10], after[:, :, 1:10])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [17, 18, 1000])
def test_a_window_no_shorter_than_the_sequence_is_no_window(window: int, dtype: torch.dtype) -> None:
    within = ragged_attention(*leaves(dtype), ALONE, scale=SCALE, window=window)
    assert torch.equal(within, ragged_attention(*leaves(dtype), ALONE, scale=SCALE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_may_have_another_head_size_than_keys(dtype: torch.dtype) -> None:
    """As in multi-head latent attention: each value with a copy beside it gives each output with a copy beside it."""
    query, key, value = leaves(dtype)
    wide = ragged_attention(query, key, torch.cat([value, value], dim=-1), ALONE, scale=SCALE)
    narrow = ragged_attention(query, key, value, ALONE, scale=SCALE)
    torch.testing.assert_close(wide, torch.cat([narrow, narrow], dim=-1), rtol=0, atol=1e-6)
    wide.sum().backward()
    assert [t.grad.shape for t in (query, key, value)] == [t.shape for t in (query, key, value)]


@CUTS
@pytest.mark.parametrize(("dtype", "window"), PATHS, ids=str)
def test_every_sequence_sees_the_prefix_as_if_it_began_with_it(
    dtype: torch.dtype, window: int | None, segments: Segments
) -> None:
    """The definition: the rows of a longer stream in which the prefix's keys and values stand before each sequence."""
    num_rows, ours = 3, leaves(dtype)
    generator = torch.Generator().manual_seed(1)
    shape = (KEY_HEADS, num_rows, SIZE)
    prefix = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(2)]
    exact = [t.detach().double().requires_grad_() for t in (*ours, *prefix)]
    attended = ragged_attention(*ours, segments, scale=SCALE, window=window, prefix=(prefix[0], prefix[1]))
    longer = segments.longer_by(num_rows)
    rows = (exact[0].new_ones(HEADS, num_rows, SIZE), *exact[3:])
    stream = [put_before_each(r[None], t, segments, dim=2) for r, t in zip(rows, exact[:3], strict=True)]
    expected = take_out(plain_attention(*stream, longer, window), num_rows, segments, dim=2)
    attended.double().square().sum().backward()
    expected.square().sum().backward()
    gradients = zip((t.grad for t in (*ours, *prefix)), (t.grad for t in exact), strict=True)
    for one, other in ((attended, expected), *gradients):
        bound = TOLERANCE[dtype] * float(other.detach().abs().max())
        torch.testing.assert_close(one.double(), other, rtol=0, atol=bound)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize(("past", "window"), [(0, None), (0, 4), (2, None), (2, 4)])
def test_a_mask_with_a_prefix_is_the_mask_of_a_longer_text(past: int, window: int | None, additive: bool) -> None:
    """Three rows of a prefix, `past` tokens in a cache and five queries: the last five rows of one causal mask."""
    places = torch.arange(3 + past + 5)
    distance = places[:, None] - places
    expected = (distance >= 0) & (distance < (window or len(places)))
    mask = expected[-5:, 3:]
    if additive:
        mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    key, prefix = torch.ones(2, KEY_HEADS, past + 5, SIZE), torch.zeros(KEY_HEADS, 3, SIZE)
    text = {"num_queries": 5, "positions": places[None, -5:]}
    keys, _, found = put_prefix(key, key, mask, (prefix, prefix), window=window, **text)
    assert keys[:, :, :, 0].sum(-1).eq(past + 5).all()
    assert torch.equal(keys[:, :, :3], torch.zeros(2, KEY_HEADS, 3, SIZE))
    assert torch.equal(found if not additive else found == 0, expected[None, None, -5:])


@pytest.mark.parametrize(("num_queries", "num_keys"), [(5, 5), (1, 5), (1, 1)])
def test_without_a_mask_a_prefix_is_seen_by_all(num_queries: int, num_keys: int) -> None:
    """What no mask means: queries from the first token on, or one query that sees all keys."""
    key, prefix = torch.ones(1, KEY_HEADS, num_keys, SIZE), torch.ones(KEY_HEADS, 2, SIZE)
    _, _, found = put_prefix(key, key, None, (prefix, prefix), num_queries=num_queries)
    if num_queries == 1:
        assert found is None
        return
    expected = torch.arange(2 + num_keys) <= torch.arange(num_queries)[:, None] + 2
    assert torch.equal(found, expected[None, None])
