"""Attention over a stream is attention of each sequence by itself, in value and in gradient, on every path."""

import pytest
import torch
from torch import Tensor

from luthier.kernels.attention import BLOCK_QUERIES, ragged_attention

HEADS, KEY_HEADS, SIZE = 4, 2, 8
SCALE = SIZE**-0.5
LENGTHS = (1, 9, 3, 17)
PATHS = [(torch.float64, None), (torch.float32, None), (torch.bfloat16, None), (torch.float32, 4), (torch.bfloat16, 4)]

# of the largest entry. float32: sums of 30 products; bfloat16: scores, weights and sums rounded to 8 bits, 2^-8 each
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def leaves(dtype: torch.dtype, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """Query, key and value."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(lengths), SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def plain_attention(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], window: int | None) -> Tensor:
    """With one mask over the whole stream: same sequence, not later, and within the window."""
    key, value = (t.repeat_interleave(HEADS // KEY_HEADS, dim=1) for t in (key, value))
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = torch.arange(sum(lengths))[:, None] - torch.arange(sum(lengths))
    seen = (sequence[:, None] == sequence) & (distance >= 0) & (distance < (window or sum(lengths)))
    scores = (query @ key.transpose(-1, -2) * SCALE).masked_fill(~seen, -torch.inf)
    return torch.softmax(scores, dim=-1) @ value


@pytest.mark.parametrize(("dtype", "window"), PATHS, ids=str)
def test_every_path_equals_one_masked_softmax_in_float64(dtype: torch.dtype, window: int | None) -> None:
    ours = leaves(dtype)
    exact = [t.detach().double().requires_grad_() for t in ours]
    attended = ragged_attention(*ours, LENGTHS, scale=SCALE, window=window)
    expected = plain_attention(*exact, LENGTHS, window)
    assert attended.dtype == dtype
    attended.double().square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip((attended, *(t.grad for t in ours)), (expected, *(t.grad for t in exact)), strict=True):
        bound = TOLERANCE[dtype] * float(other.detach().abs().max())
        torch.testing.assert_close(one.double(), other, rtol=0, atol=bound)


def test_bfloat16_sequences_of_several_blocks_agree_as_well() -> None:
    lengths = (2 * BLOCK_QUERIES + 40, BLOCK_QUERIES)
    ours = leaves(torch.bfloat16, lengths)
    exact = [t.detach().double().requires_grad_() for t in ours]
    attended = ragged_attention(*ours, lengths, scale=SCALE)
    expected = plain_attention(*exact, lengths, None)
    attended.double().square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip((attended, *(t.grad for t in ours)), (expected, *(t.grad for t in exact)), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=2e-2 * float(other.detach().abs().max()))


def test_large_scores_lose_nothing_in_bfloat16() -> None:
    """Scores near 200, as keys with a bias have them; rounded to 8 bits they would be off by half a nat."""
    query, key, value = (t.detach() for t in leaves(torch.bfloat16))
    query = query * 64
    expected = plain_attention(query.double(), key.double(), value.double(), LENGTHS, None)
    attended = ragged_attention(query, key, value, LENGTHS, scale=SCALE)
    torch.testing.assert_close(attended.double(), expected, rtol=0, atol=2e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_changed_neighbour_changes_no_bit_of_the_others(dtype: torch.dtype) -> None:
    """Each sequence is a computation of its own, so equality is exact."""
    with torch.no_grad():
        before = ragged_attention(*leaves(dtype), LENGTHS, scale=SCALE)
        changed = leaves(dtype)
        for t in changed:
            t[:, :, 1:10] += 3
        after = ragged_attention(*changed, LENGTHS, scale=SCALE)
    assert torch.equal(before[:, :, :1], after[:, :, :1])
    assert torch.equal(before[:, :, 10:], after[:, :, 10:])
    assert not torch.equal(before[:, :, 1:10], after[:, :, 1:10])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [17, 18, 1000])
def test_a_window_no_shorter_than_the_sequence_is_no_window(window: int, dtype: torch.dtype) -> None:
    within = ragged_attention(*leaves(dtype), LENGTHS, scale=SCALE, window=window)
    assert torch.equal(within, ragged_attention(*leaves(dtype), LENGTHS, scale=SCALE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_may_have_another_head_size_than_keys(dtype: torch.dtype) -> None:
    """As in multi-head latent attention: each value with a copy beside it gives each output with a copy beside it."""
    query, key, value = leaves(dtype)
    wide = ragged_attention(query, key, torch.cat([value, value], dim=-1), LENGTHS, scale=SCALE)
    narrow = ragged_attention(query, key, value, LENGTHS, scale=SCALE)
    torch.testing.assert_close(wide, torch.cat([narrow, narrow], dim=-1), rtol=0, atol=1e-6)
    wide.sum().backward()
    assert [t.grad.shape for t in (query, key, value)] == [t.shape for t in (query, key, value)]
