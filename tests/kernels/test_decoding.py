"""A new token of each answer attends to its prompt and its own tokens alone, whoever else is in the batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from luthier.kernels.decoding import Decoding, OwnKeys, PromptKeys, PromptPairs, decode_attention

HEADS, KEY_HEADS, SIZE = 4, 2, 8
SCALE = SIZE**-0.5
PROMPTS = (5, 1, 11)
GROUPS = ((0, 3), (1, 1), (2, 2))  # prompt, rows
LENGTHS = (3, 0, 6, 2, 1, 4)  # own tokens of each row
LONGEST = 9
GARBAGE = 50.0  # where nothing may be read: finite, as what an earlier answer has left

# of the largest entry. float32: sums of 20 products; bfloat16: scores, weights and sums rounded to 8 bits, 2^-8 each
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


class Step:
    """A step in the middle of a generation: random keys of prompts and rows, and the new tokens'."""

    def __init__(self, lengths: tuple[int, ...] = LENGTHS, *, dtype: torch.dtype, value_size: int = SIZE) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.lengths, sizes = lengths, (SIZE, value_size)
        self.query = draw(1, HEADS, len(lengths), SIZE)
        self.key, self.value = (draw(1, KEY_HEADS, len(lengths), size) for size in sizes)
        self.prompts = [tuple(draw(KEY_HEADS, n, size) for size in sizes) for n in PROMPTS]
        self.written = [tuple(draw(KEY_HEADS, n, size) for size in sizes) for n in lengths]
        self.own = OwnKeys(len(lengths) + 1, LONGEST)
        for room in self.own.of(0, self.key[0], self.value[0]):
            room.fill_(GARBAGE)
        for row, pair in enumerate(self.written):
            for room, one in zip(self.own.layers[0], pair, strict=True):
                room[row, :, : one.shape[1]] = one

    def groups(self) -> list[tuple[slice, PromptPairs]]:
        found, first = [], 0
        for prompt, count in GROUPS:
            found.append((slice(first, first + count), {0: self.prompts[prompt]}))
            first += count
        return found

    def attended(self, window: int | None) -> Tensor:
        owners = [prompt for prompt, count in GROUPS for _ in range(count)]
        positions = torch.tensor([PROMPTS[p] + n for p, n in zip(owners, self.lengths, strict=True)])
        decoding = Decoding.of(self.own, self.lengths, self.groups(), positions, self.query.dtype)
        return decode_attention(self.query, self.key, self.value, decoding, 0, scale=SCALE, window=window)

    def expected(self, window: int | None) -> Tensor:
        """One softmax a row, in float64, over prompt, own tokens and the new one."""
        rows = []
        for i, prompt in enumerate(prompt for prompt, count in GROUPS for _ in range(count)):
            new = self.key[0][:, i, None], self.value[0][:, i, None]
            pieces = zip(self.prompts[prompt], self.written[i], new, strict=True)
            keys, values = (torch.cat(parts, 1).double()[:, -(window or 99) :] for parts in pieces)
            keys, values = (t.repeat_interleave(HEADS // KEY_HEADS, dim=0) for t in (keys, values))
            scores = torch.einsum("hd,hkd->hk", self.query[0, :, i].double(), keys) * SCALE
            rows.append(torch.einsum("hk,hkd->hd", torch.softmax(scores, -1), values))
        return torch.stack(rows)[None]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [None, 4, 9, 10, 1000])
@pytest.mark.parametrize("lengths", [LENGTHS, (4,) * 6], ids=["ragged", "even"])
@pytest.mark.parametrize("value_size", [SIZE, 2 * SIZE])
def test_every_path_equals_one_softmax_over_prompt_and_own_tokens(
    dtype: torch.dtype, window: int | None, lengths: tuple[int, ...], value_size: int
) -> None:
    """Values of another size than keys, and windows, take the path that lays the two sets of keys together."""
    step = Step(lengths, dtype=dtype, value_size=value_size)
    found, expected = step.attended(window), step.expected(window)
    assert found.dtype == dtype
    assert found.shape == (1, len(lengths), HEADS, value_size)
    bound = TOLERANCE[dtype] * float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("window", [None, 4])
def test_a_changed_neighbour_changes_no_bit_of_the_others(window: int | None) -> None:
    """A neighbour of the same group, which shares the prompt's call, and one of another."""
    before = Step(dtype=torch.float32)
    expected = before.attended(window)
    changed = Step(dtype=torch.float32)
    for row in (1, 4):
        changed.query[:, :, row] += 1
        changed.key[:, :, row] -= 2
        changed.own.layers[0][1][row] += 3
    found = changed.attended(window)
    same = torch.tensor([0, 2, 3, 5])
    assert torch.equal(found[:, same], expected[:, same])
    assert not torch.isclose(found, expected)[:, [1, 4]].all(-1).any()


@pytest.mark.parametrize("lengths", [LENGTHS, (4,) * 6], ids=["ragged", "even"])
def test_a_new_token_is_written_behind_its_rows_own_and_nowhere_else(lengths: tuple[int, ...]) -> None:
    step = Step(lengths, dtype=torch.float32)
    before = [room.clone() for room in step.own.layers[0]]
    step.attended(None)
    for room, old, new in zip(step.own.layers[0], before, (step.key, step.value), strict=True):
        for row, length in enumerate(lengths):
            assert torch.equal(room[row, :, length], new[0, :, row])
            old[row, :, length] = new[0, :, row]
        assert torch.equal(room, old)


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.integers(0, 5))
def test_rows_that_are_kept_move_up_with_what_they_have_written(kept: list[bool], num_tokens: int) -> None:
    own = OwnKeys(len(kept), 5)
    keys, values = own.of(3, torch.zeros(2, 1, 4), torch.zeros(2, 1, 6))
    for room in (keys, values):
        room.copy_(torch.arange(room.numel()).view(room.shape))
    before = keys.clone(), values.clone()
    rows = [row for row, keep in enumerate(kept) if keep]
    own.keep_only(rows, num_tokens)
    for room, old in zip((keys, values), before, strict=True):
        assert torch.equal(room[: len(rows), :, :num_tokens], old[rows, :, :num_tokens])


def test_prompts_are_cut_out_of_the_stream_without_what_makes_it_longer() -> None:
    stream = torch.arange(2 * 12 * 4.0).view(2, 12, 4), torch.arange(2 * 12 * 6.0).view(2, 12, 6)
    prompts = PromptKeys((3, 1, 5))
    prompts.keep(7, *stream)
    for prompt, place in enumerate((slice(0, 3), slice(3, 4), slice(4, 9))):
        pairs = prompts.of(prompt)
        assert pairs.keys() == {7}
        assert all(torch.equal(one, whole[:, place]) for one, whole in zip(pairs[7], stream, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_room_is_reserved_once_a_layer_and_holds_zeros(dtype: torch.dtype) -> None:
    """In bytes: rows x key heads x longest x (key size + value size) x bytes of a number, for each layer."""
    own, like = OwnKeys(3, 7), (torch.ones(2, 1, 4, dtype=dtype), torch.ones(2, 1, 6, dtype=dtype))
    first = own.of(0, *like)
    assert own.of(0, *like) is first
    assert own.of(1, *like) is not first
    assert not any(room.any() or room.dtype != dtype for pair in own.layers.values() for room in pair)
    held = sum(room.nbytes for pair in own.layers.values() for room in pair)
    assert held == 2 * 3 * 2 * 7 * (4 + 6) * dtype.itemsize
