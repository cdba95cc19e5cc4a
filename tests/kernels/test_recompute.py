"""What a backward pass forms again: the same gradients, fewer bytes, and never a tensor that has changed since."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from luthier.kernels import recompute
from luthier.kernels.gate import gated
from luthier.kernels.linear import linear
from luthier.kernels.low_rank import add_low_rank
from luthier.kernels.norm import rms_norm

TOKENS, WIDTH, RANK = 16, 24, 3


def weights(count: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for _ in range(count)]


def through_norm(x: Tensor) -> Tensor:
    return rms_norm(x, torch.linspace(0.5, 2, WIDTH), eps=1e-6)


def through_gate(x: Tensor) -> Tensor:
    return gated(x * 1.0, x * 2.0, activation="silu")


def read_thrice(y: Tensor) -> Tensor:
    """As queries, keys and values read a norm's output."""
    total = y.new_zeros(TOKENS, WIDTH)
    for a, b in zip(weights(3, RANK, WIDTH), weights(3, WIDTH, RANK), strict=True):
        total = total + add_low_rank((y * 0.5).view(TOKENS, WIDTH), y.reshape(TOKENS, WIDTH), a, b, 2.0).square()
    return total + linear(y, weights(1, WIDTH, WIDTH)[0]).view(TOKENS, WIDTH)


def saved_by(run: Callable[[], Tensor]) -> tuple[Tensor, set[int]]:
    """The result, and the storages that autograd keeps."""
    seen: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        seen.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return run(), seen


@pytest.mark.parametrize("make", [through_norm, through_gate])
class TestFormedAgain:
    def test_gradients_are_those_of_a_kept_tensor(
        self, make: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (x,) = weights(1, 1, TOKENS, WIDTH)
        formed = torch.autograd.grad(read_thrice(make(x)).sum(), x)[0]
        monkeypatch.setattr(recompute._Origin, "is_of", lambda *_: False)
        kept = torch.autograd.grad(read_thrice(make(x)).sum(), x)[0]
        assert torch.equal(formed, kept)

    def test_the_tensor_itself_is_not_kept(self, make: Callable[[Tensor], Tensor]) -> None:
        (x,) = weights(1, 1, TOKENS, WIDTH)
        (a,), (b,) = weights(1, RANK, WIDTH), weights(1, WIDTH, RANK)
        y = make(x)
        _, kept = saved_by(lambda: add_low_rank(torch.zeros(TOKENS, WIDTH), y[0], a, b, 1.0))
        assert y.untyped_storage().data_ptr() not in kept
        _, kept = saved_by(lambda: add_low_rank(torch.zeros(8, WIDTH), y[0, :8], a, b, 1.0))
        assert y.untyped_storage().data_ptr() in kept, "a part of it is kept as it is"

    def test_one_that_was_written_to_is_kept_as_it_is(self, make: Callable[[Tensor], Tensor]) -> None:
        (x,), (a,), (b,) = weights(1, 1, TOKENS, WIDTH), weights(1, RANK, WIDTH), weights(1, WIDTH, RANK)
        y = make(x)
        with torch.no_grad():
            y.mul_(3)
        add_low_rank(torch.zeros(TOKENS, WIDTH), y[0], a, b, 1.0).sum().backward()
        expected = (torch.ones(TOKENS, WIDTH) @ b.detach()).T @ y[0].detach()
        assert torch.allclose(a.grad, expected, rtol=1e-5, atol=1e-5)

    def test_it_is_formed_once_for_all_who_read_it(self, make: Callable[[Tensor], Tensor]) -> None:
        (x,) = weights(1, 1, TOKENS, WIDTH)
        y = make(x)
        origin = recompute._ORIGINS[y.untyped_storage()]
        form, calls = origin.recipe.form, []
        origin.recipe.form = lambda *tensors: (calls.append(1), form(*tensors))[1]
        loss = read_thrice(y).sum()
        assert origin.recipe.waiting == 4
        loss.backward()
        assert (len(calls), origin.recipe.waiting, origin.recipe.formed) == (1, 0, None)

    def test_a_second_backward_pass_gives_the_same(self, make: Callable[[Tensor], Tensor]) -> None:
        (x,) = weights(1, 1, TOKENS, WIDTH)
        loss = read_thrice(make(x)).sum()
        first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)

    def test_under_gradient_checkpointing(self, make: Callable[[Tensor], Tensor]) -> None:
        (x,) = weights(1, 1, TOKENS, WIDTH)
        plain = torch.autograd.grad(read_thrice(make(x)).sum(), x)[0]
        again = torch.autograd.grad(checkpoint(lambda x: read_thrice(make(x)), x, use_reentrant=False).sum(), x)[0]
        assert torch.equal(plain, again)

    def test_nothing_is_remembered_of_a_tensor_that_is_gone(self, make: Callable[[Tensor], Tensor]) -> None:
        (x,) = weights(1, 1, TOKENS, WIDTH)
        y = make(x)
        remembered = weakref.ref(recompute._ORIGINS[y.untyped_storage()])
        del y
        assert remembered() is None

    def test_nothing_is_remembered_where_there_is_no_backward_pass(self, make: Callable[[Tensor], Tensor]) -> None:
        (x,) = weights(1, 1, TOKENS, WIDTH)
        with torch.no_grad():
            y = make(x * 1.0)
        assert y.untyped_storage() not in recompute._ORIGINS
        with torch.inference_mode():
            assert torch.equal(make(x * 1.0), y)
