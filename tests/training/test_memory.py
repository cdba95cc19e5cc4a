"""An allocation that the machine has no memory for fails, and is no end."""

import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context

import pytest
import torch

from luthier.shortage import again_with_less, ran_out, release_freed_memory
from luthier.training.memory import keep_freed_memory, resident_bytes, within_free_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can be told how much a process may hold")

CPU, MEBIBYTE = torch.device("cpu"), 2**20


def alone(work: Callable[[], None]) -> None:
    """Does the work in a process of its own, whose heap has no holes that others left."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(work).result()


def test_what_is_not_free_cannot_be_had_and_what_is_can() -> None:
    alone(_what_is_free)


def _what_is_free() -> None:
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


def test_what_was_given_back_can_be_had_again_in_other_sizes() -> None:
    """Pieces of a heap whose end is in use: their pages are given back, and their addresses go on counting."""
    alone(_in_other_sizes)


def _in_other_sizes() -> None:
    keep_freed_memory()
    pins: list[bytearray] = []

    def work() -> int:
        if not pins:
            held = []
            while True:
                held.append(torch.ones(16 * MEBIBYTE, dtype=torch.uint8))
                pins.append(bytearray(100_000))
        return torch.ones(200 * MEBIBYTE, dtype=torch.uint8).nbytes

    told: list[str] = []

    def give_way(said: str) -> None:
        assert not told, said
        told.append(said)

    with within_free_memory(CPU, 400 * MEBIBYTE):
        assert again_with_less(work, give_way) == 200 * MEBIBYTE
    assert told


def test_holes_of_the_heap_count_as_memory_that_is_free() -> None:
    """They are filled without asking the system, so what it may still promise is less by them."""
    alone(_with_holes)


def _with_holes() -> None:
    keep_freed_memory()
    _, pins = filled(at_most=40)
    release_freed_memory()
    start = resident_bytes()
    with within_free_memory(CPU, 600 * MEBIBYTE):
        most, _ = filled()
    assert 250 * MEBIBYTE < most - start < 650 * MEBIBYTE  # not every hole fits a piece of its size again
    assert len(pins) == 40


def filled(at_most: int = 10_000) -> tuple[int, list[bytearray]]:
    """The resident set with as many pieces of 8 MiB as there is memory for; and what keeps their places apart."""
    pieces, pins = [], []
    with suppress(RuntimeError):
        while len(pieces) < at_most:
            pieces.append(torch.ones(8 * MEBIBYTE, dtype=torch.uint8))
            pins.append(bytearray(100_000))
    return resident_bytes(), pins
