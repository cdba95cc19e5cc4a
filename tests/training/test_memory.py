"""An allocation that the machine has no memory for fails, and is no end."""

import sys

import pytest
import torch

from luthier.shortage import ran_out
from luthier.training.memory import within_free_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can be told how much a process may hold")

CPU, MEBIBYTE = torch.device("cpu"), 2**20


def test_what_is_not_free_cannot_be_had_and_what_is_can() -> None:
    with within_free_memory(CPU, 100 * MEBIBYTE):
        kept = torch.ones(60 * MEBIBYTE, dtype=torch.uint8)
        with pytest.raises(RuntimeError) as raised:
            torch.empty(200 * MEBIBYTE, dtype=torch.uint8)
    assert ran_out(raised.value)
    assert torch.empty(200 * MEBIBYTE, dtype=torch.uint8).nbytes > kept.nbytes


def test_a_bound_that_the_user_has_set_stays() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    with within_free_memory(CPU, 100 * MEBIBYTE):
        bound = resource.getrlimit(resource.RLIMIT_DATA)[0]
        with within_free_memory(CPU, 10_000 * MEBIBYTE):
            assert resource.getrlimit(resource.RLIMIT_DATA)[0] == bound
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_all_that_is_free_can_be_had() -> None:
    with within_free_memory(CPU):
        assert torch.empty(100 * MEBIBYTE, dtype=torch.uint8).nbytes
