"""The deterministic mode holds within its context only, and what has no deterministic form is refused in a sentence."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from luthier.data.batches import TokenBatch
from luthier.errors import TrainingError
from luthier.objectives.loss import Loss
from luthier.training.deterministic import deterministic
from luthier.training.loop import fit
from luthier.training.run import Run

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def switches() -> tuple[object, ...]:
    backends = torch.backends
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        backends.cudnn.benchmark,
        backends.cudnn.deterministic,
        backends.cuda.matmul.fp32_precision,
        backends.cudnn.conv.fp32_precision,
        os.environ.get(CUBLAS),
    )


@contextmanager
def set_before() -> Iterator[tuple[object, ...]]:
    """Everything the other way round, as a user may have set it; all as it was in the end."""
    backends, was = torch.backends, torch.backends.cuda.matmul.fp32_precision
    torch.use_deterministic_algorithms(True, warn_only=True)
    backends.cudnn.benchmark, backends.cuda.matmul.fp32_precision = True, "tf32"
    try:
        yield switches()
    finally:
        torch.use_deterministic_algorithms(False)
        backends.cudnn.benchmark, backends.cuda.matmul.fp32_precision = False, was


def test_within_the_context_everything_is_on() -> None:
    with set_before() as before, deterministic(True):
        assert before[:3] == (True, True, True)
        assert switches() == (True, False, False, True, "ieee", "ieee", ":4096:8")


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
def test_what_was_set_before_comes_back_whatever_ends_the_context(error: type[BaseException] | None) -> None:
    with set_before() as before:
        with pytest.raises(error) if error else nullcontext(), deterministic(True):
            if error is not None:
                raise error
        assert switches() == before


def test_the_users_own_workspace_stays() -> None:
    environment = {CUBLAS: ":16:8"}
    with deterministic(True, environment=environment):
        assert environment == {CUBLAS: ":16:8"}
    assert environment == {CUBLAS: ":16:8"}


def test_without_it_nothing_is_touched() -> None:
    before = switches()
    with deterministic(False):
        assert switches() == before


def put(values: Tensor) -> Tensor:
    """Writes twice to one place, so that the hardware decides which value stays."""
    return torch.zeros(4).put_(torch.tensor([0, 0]), values)


def test_an_operation_without_a_deterministic_form_is_refused_by_name() -> None:
    refused = pytest.raises(TrainingError, match=r"deterministic: put_ gives other bits each time here.*; drop")
    with refused, deterministic(True):
        put(torch.tensor([1.0, 2.0]))
    assert put(torch.tensor([1.0, 1.0]))[0] == 1


def test_a_training_with_such_an_operation_is_refused(run_of: Callable[..., Run]) -> None:
    def objective(network: nn.Module, batch: TokenBatch) -> Loss:
        put(torch.tensor([1.0, 2.0]))
        raise AssertionError("not reached")

    with pytest.raises(TrainingError, match="deterministic: put_"), deterministic(True):
        fit(run_of(objective=objective))


def test_a_training_has_the_same_bits_with_and_without(run_of: Callable[..., Run]) -> None:
    """On a CPU nothing is left to the hardware, so the mode changes no number there, and refuses nothing of ours."""
    found = []
    for wanted in (False, True):
        run = run_of(dropout=0.3)
        with deterministic(wanted):
            fit(run)
        found.append(run.state.tensors())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
