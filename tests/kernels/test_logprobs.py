"""The fused output layer gives the log-probabilities, entropies and gradients of the full logits matrix."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from luthier.kernels.logprobs import FurtherRows, HeadOptions, linear_logprobs, linear_logprobs_plain

ROWS, HIDDEN, VOCABULARY = 70, 6, 31
IN_CHUNKS = HeadOptions(chunk_bytes=4 * VOCABULARY * 20)  # 20 rows of float32 logits, made up to 32: three chunks
OPTIONS = [replace(IN_CHUNKS, scale=s, softcap=c) for s, c in product((1.0, 0.25), (None, 2.0))]
OPTIONS += [replace(OPTIONS[i], temperature=t) for i, t in ((0, 0.7), (3, 1.6))]

Head = tuple[Tensor, Tensor, Tensor, Tensor]


def head(dtype: torch.dtype = torch.float64, *, rows: int = ROWS) -> Head:
    """Hidden states, weight, bias and targets; logits have a deviation near 2.5, so a soft cap of 2 matters."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((rows, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,))
    )
    return hidden, weight, bias, torch.randint(VOCABULARY, (rows,), generator=generator)


def gradients(
    function: Callable[..., tuple[Tensor, Tensor]], inputs: Head, options: HeadOptions, *, frozen: bool
) -> list[Tensor]:
    """Log-probabilities, entropies and the gradients of an uneven sum of the former."""
    leaves = [t.clone().requires_grad_(not frozen or i == 0) for i, t in enumerate(inputs[:3])]
    logprobs, entropy = function(*leaves, inputs[3], options)
    uneven = torch.linspace(-1, 2, len(logprobs), dtype=logprobs.dtype)
    (logprobs * uneven).sum().backward()
    return [logprobs.detach(), entropy, *(t.grad for t in leaves if t.grad is not None)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_the_fused_head_equals_full_logits_in_float64(options: HeadOptions, frozen: bool) -> None:
    fused = gradients(linear_logprobs, head(), options, frozen=frozen)
    plain = gradients(linear_logprobs_plain, head(), options, frozen=frozen)
    assert len(fused) == (3 if frozen else 5)
    for ours, expected in zip(fused, plain, strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_gradients_of_the_head_agree_with_finite_differences(options: HeadOptions, trained: tuple[int, ...]) -> None:
    inputs = head(rows=40)
    leaves = [t.clone().requires_grad_(i in trained) for i, t in enumerate(inputs[:3])]
    assert torch.autograd.gradcheck(lambda *x: linear_logprobs(*x, inputs[3], options)[0], leaves, fast_mode=True)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("trained", [(0,), (0, 1, 2)], ids=str)
def test_gradients_of_entropies_agree_with_finite_differences(options: HeadOptions, trained: tuple[int, ...]) -> None:
    inputs = head(rows=40)
    leaves = [t.clone().requires_grad_(i in trained) for i, t in enumerate(inputs[:3])]

    def both(*leaves: Tensor) -> Tensor:
        logprobs, entropy = linear_logprobs(*leaves, inputs[3], options, entropy_gradient=True)
        return torch.stack([logprobs, entropy])

    assert torch.autograd.gradcheck(both, leaves, fast_mode=True)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_how_rows_are_cut_into_chunks_changes_nothing(frozen: bool) -> None:
    cut = gradients(linear_logprobs, head(), IN_CHUNKS, frozen=frozen)
    whole = gradients(linear_logprobs, head(), HeadOptions(), frozen=frozen)
    for one, other in zip(cut, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_how_many_rows_stay_in_the_cache_changes_nothing(frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gradients(linear_logprobs, head(), IN_CHUNKS, frozen=frozen)
    monkeypatch.setattr("luthier.kernels.logprobs.CACHED_BYTES", 4 * VOCABULARY * 5)
    few = gradients(linear_logprobs, head(), IN_CHUNKS, frozen=frozen)
    for one, other in zip(few, whole, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_a_float32_head_agrees_with_float64(frozen: bool) -> None:
    """To 1e-5 of the largest: float32 sums of 31 products."""
    fused = gradients(linear_logprobs, head(torch.float32), IN_CHUNKS, frozen=frozen)
    hidden, weight, bias, targets = head(torch.float32)
    exact = gradients(
        linear_logprobs_plain, (hidden.double(), weight.double(), bias.double(), targets), IN_CHUNKS, frozen=frozen
    )
    for ours, expected in zip(fused, exact, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


def test_a_head_without_bias_equals_a_bias_of_zero() -> None:
    hidden, weight, bias, targets = head()
    without = linear_logprobs(hidden, weight, None, targets, IN_CHUNKS)
    zero = linear_logprobs(hidden, weight, torch.zeros_like(bias), targets, IN_CHUNKS)
    for one, other in zip(without, zero, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_a_bfloat16_head_agrees_with_float64(frozen: bool) -> None:
    """Logits up to 8 are rounded to 8 bits: by at most 2^-6; gradients by a few roundings of their largest entry."""
    fused = gradients(linear_logprobs, head(torch.bfloat16), IN_CHUNKS, frozen=frozen)
    hidden, weight, bias, targets = head(torch.bfloat16)
    wide = (hidden.double(), weight.double(), bias.double(), targets)
    exact = gradients(linear_logprobs_plain, wide, IN_CHUNKS, frozen=frozen)
    assert fused[0].dtype == torch.float32
    for ours, expected in zip(fused, exact, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=0.02 * max(1.0, float(expected.abs().max())))


def test_no_targets_give_no_logprobs_and_a_gradient_of_zero() -> None:
    hidden, weight, bias, targets = head(rows=0)
    hidden.requires_grad_()
    logprobs, entropy = linear_logprobs(hidden, weight, bias, targets, HeadOptions())
    logprobs.sum().backward()
    assert logprobs.shape == entropy.shape == (0,)
    assert hidden.grad is not None


def test_logits_far_apart_give_finite_logprobs_and_no_entropy() -> None:
    """One word is ahead by 2,000 nats: its log-probability is 0, the other's -2000, and exp(2000) is never formed."""
    weight = torch.tensor([[1000.0], [-1000.0]])
    logprobs, entropy = linear_logprobs(torch.ones(2, 1), weight, None, torch.tensor([0, 1]), HeadOptions())
    assert logprobs.tolist() == [0.0, -2000.0]
    assert entropy.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("columns", [(VOCABULARY, VOCABULARY + 1), (3, 5), (4, VOCABULARY)], ids=str)
@pytest.mark.parametrize("trained", [(0, 1), (0,), (1,), (0, 1, 2)], ids=str)
def test_rows_kept_apart_count_as_if_they_were_in_the_head(
    options: HeadOptions, columns: tuple[int, ...], trained: tuple[int, ...]
) -> None:
    """In float64. trained: of hidden states, rows apart and the head's own weight, which are given a gradient."""
    hidden, weight, bias, targets = head()
    leaves = [hidden, weight[:2] * 0.7, weight.clone()]
    targets[:4] = torch.tensor([columns[0], columns[1], columns[0], 0])

    def dense(hidden: Tensor, rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        longer = torch.cat([weight, weight.new_zeros(2, HIDDEN)]).index_copy(0, torch.tensor(columns), rows)
        num_columns = max(VOCABULARY, columns[-1] + 1)
        padded = torch.nn.functional.pad(bias, (0, num_columns - VOCABULARY))
        return linear_logprobs_plain(hidden, longer[:num_columns], padded, targets, options)

    def apart(hidden: Tensor, rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logprobs(hidden, weight, bias, targets, options, further=FurtherRows(rows, columns))

    found = []
    for function in (dense, apart):
        given = [t.clone().requires_grad_(i in trained) for i, t in enumerate(leaves)]
        logprobs, entropy = function(*given)
        (logprobs * torch.linspace(-1, 2, len(logprobs), dtype=logprobs.dtype)).sum().backward()
        found.append([logprobs.detach(), entropy, *(t.grad for t in given if t.grad is not None)])
    assert len(found[1]) == 2 + len(trained)
    for ours, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
