"""The adapter cache against a plain model of an LRU, under threads, and when loading fails or brings too much."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from weakref import ReferenceType, ref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.adapters.cache import AdapterCache, CacheStats
from luthier.adapters.inject import inject
from luthier.adapters.peft_format import read_adapter, save_adapter
from luthier.errors import AdapterError
from luthier.recipe.adapters import LoRA

MODEL = "smollm2-135m"


def cache_of(load: Callable[[str, str], str], max_bytes: int = 100, max_adapters: int = 8) -> AdapterCache[str]:
    """A cache of texts, a byte a letter."""
    return AdapterCache(load, size_bytes=len, max_bytes=max_bytes, max_adapters=max_adapters)


def lru(wanted: list[int], max_bytes: int, max_adapters: int) -> tuple[list[int], CacheStats]:
    """By definition: keys are their own sizes; kept is the longest run of latest uses within the bounds."""
    kept: list[int] = []
    hits = evictions = 0
    for key in wanted:
        hits += key in kept
        kept = [other for other in kept if other != key] + [key] * (key <= max_bytes)
        while len(kept) > max_adapters or sum(kept) > max_bytes:
            kept.pop(0)
            evictions += 1
    return kept, CacheStats(hits, len(wanted) - hits, evictions, len(kept), sum(kept))


@given(st.lists(st.integers(1, 9), max_size=60), st.integers(1, 20), st.integers(1, 5))
def test_the_cache_is_an_lru(wanted: list[int], max_bytes: int, max_adapters: int) -> None:
    loaded: list[int] = []

    def load(model: str, adapter: str) -> str:
        loaded.append(int(adapter))
        return "x" * int(adapter)

    cache = cache_of(load, max_bytes, max_adapters)
    assert [len(cache.get(MODEL, str(key))) for key in wanted] == wanted
    kept, stats = lru(wanted, max_bytes, max_adapters)
    assert (cache.stats, len(loaded)) == (stats, stats.misses)
    loaded.clear()
    for key in kept:
        cache.get(MODEL, str(key))
    assert loaded == []


def test_threads_get_the_right_weights_within_the_bounds_and_nothing_grows() -> None:
    """64 adapters of 256 floats, 8 threads of 1,000 gets, room for 8 by count and for 6 by bytes."""
    loaded: list[ReferenceType[Tensor]] = []

    def load(model: str, adapter: str) -> Tensor:
        weights = torch.full((256,), float(adapter))
        loaded.append(ref(weights))
        return weights

    cache = AdapterCache(load, size_bytes=lambda value: value.nbytes, max_bytes=6 * 1024, max_adapters=8)

    def ask(thread: int) -> None:
        random = Random(thread)
        for _ in range(1000):
            key = random.randrange(64)
            weights = cache.get(MODEL, str(key))
            assert torch.equal(weights, torch.full((256,), float(key)))
            stats = cache.stats
            assert stats.num_adapters <= 6
            assert stats.bytes == 1024 * stats.num_adapters

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, range(8)))
    stats = cache.stats
    assert stats.hits + stats.misses == 8000
    assert (stats.num_adapters, stats.evictions) == (6, len(loaded) - 6)
    assert sum(weights() is not None for weights in loaded) == 6
    cache.clear()
    assert all(weights() is None for weights in loaded)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, dict[str, Tensor]]:
    """64 saved adapters of one small model, by folder, and the weights of each."""
    config = LlamaConfig(vocab_size=7, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    saved = {}
    for i in range(64):
        model = LlamaForCausalLM(config).requires_grad_(False)
        (adapter,) = inject(model, LoRA(r=2, target_modules=("v_proj",)), seed=i)
        torch.nn.init.normal_(adapter.lora_B, generator=torch.Generator().manual_seed(i))
        save_adapter(model, tmp_path / str(i), base_model=MODEL)
        saved[str(tmp_path / str(i))] = {name: tensor.clone() for name, tensor in adapter.saved().items()}
    return saved


def test_threads_get_the_weights_of_saved_adapters(folders: dict[str, dict[str, Tensor]]) -> None:
    """64 adapters of 2 x 16 floats, 128 bytes, in files; 8 threads of 100 gets, room for 8 by count, 7 by bytes."""

    def size(tensors: dict[str, Tensor]) -> int:
        return sum(tensor.nbytes for tensor in tensors.values())

    cache = AdapterCache(
        lambda model, folder: read_adapter(Path(folder)).tensors(), size_bytes=size, max_bytes=7 * 128, max_adapters=8
    )

    def ask(thread: int) -> None:
        random = Random(thread)
        for folder in random.choices(list(folders), k=100):
            found, expected = cache.get(MODEL, folder), folders[folder]
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
            stats = cache.stats
            assert stats.num_adapters <= 7
            assert stats.bytes == 128 * stats.num_adapters

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, range(8)))
    assert cache.stats.hits + cache.stats.misses == 800
    assert cache.stats.num_adapters == 7


class Gate:
    """A `load` that says when it has begun and waits until it may end."""

    def __init__(self, outcome: Callable[[], str]) -> None:
        self.outcome, self.num_loads = outcome, 0
        self.begun, self.open = threading.Event(), threading.Event()

    def __call__(self, model: str, adapter: str) -> str:
        self.num_loads += 1
        self.begun.set()
        assert self.open.wait(10)
        return self.outcome()


def eight_ask(cache: AdapterCache[str], gate: Gate) -> list[str | BaseException]:
    """What eight threads get that all ask before the first load ends."""
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(cache.get, MODEL, "a") for _ in range(8)]
        while cache.stats.misses < 8:
            time.sleep(0.001)
        gate.open.set()
        return [future.exception(10) or future.result(10) for future in asked]


def test_an_adapter_that_many_threads_want_is_loaded_once() -> None:
    gate = Gate(lambda: "weights")
    cache = cache_of(gate)
    assert eight_ask(cache, gate) == ["weights"] * 8
    assert (gate.num_loads, cache.stats) == (1, CacheStats(0, 8, 0, 1, 7))


def test_a_failing_load_fails_for_all_who_wait_and_is_tried_again() -> None:
    outcomes = iter([AdapterError("a: truncated"), "weights"])

    def outcome() -> str:
        result = next(outcomes)
        if isinstance(result, AdapterError):
            raise result
        return result

    gate = Gate(outcome)
    cache = cache_of(gate)
    assert [str(error) for error in eight_ask(cache, gate)] == ["a: truncated"] * 8
    assert (gate.num_loads, cache.stats) == (1, CacheStats(0, 8, 0, 0, 0))
    assert cache.get(MODEL, "a") == "weights"
    assert cache.stats == CacheStats(0, 9, 0, 1, 7)


def test_an_adapter_whose_size_cannot_be_told_does_not_block_its_key() -> None:
    cache: AdapterCache[int] = AdapterCache(
        lambda model, adapter: 1, size_bytes=lambda value: 1 // 0, max_bytes=1, max_adapters=1
    )
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            cache.get(MODEL, "a")


def test_an_adapter_over_the_bound_is_returned_and_displaces_nothing() -> None:
    cache = cache_of(lambda model, adapter: adapter, max_bytes=3)
    assert [cache.get(MODEL, adapter) for adapter in ("abc", "abcd", "abcd", "abc")] == ["abc", "abcd", "abcd", "abc"]
    assert cache.stats == CacheStats(hits=1, misses=3, evictions=0, num_adapters=1, bytes=3)


def test_the_same_adapter_of_two_models_is_two_entries() -> None:
    cache = cache_of(lambda model, adapter: f"{adapter} of {model}")
    assert [cache.get("m", "a"), cache.get("n", "a")] == ["a of m", "a of n"]
    cache.drop("m", "a")
    cache.drop("m", "never asked for")
    cache.get("n", "a")
    assert cache.stats == CacheStats(hits=1, misses=2, evictions=0, num_adapters=1, bytes=6)


@pytest.mark.parametrize("forget", [lambda cache: cache.drop(MODEL, "a"), lambda cache: cache.clear()])
def test_what_is_dropped_while_it_loads_is_handed_over_and_not_kept(
    forget: Callable[[AdapterCache[str]], None],
) -> None:
    """Who asks after the drop gets what is loaded after it, though the old load ends while the new one runs."""
    old, new = Gate(lambda: "old"), Gate(lambda: "new")
    gates = [old, new]
    cache = cache_of(lambda model, adapter: gates.pop(0)(model, adapter))
    with ThreadPoolExecutor(2) as threads:
        before = threads.submit(cache.get, MODEL, "a")
        assert old.begun.wait(10)
        forget(cache)
        after = threads.submit(cache.get, MODEL, "a")
        assert new.begun.wait(10)
        old.open.set()
        assert before.result(10) == "old"
        assert cache.stats.num_adapters == 0
        new.open.set()
        assert after.result(10) == "new"
    assert cache.get(MODEL, "a") == "new"
    assert cache.stats == CacheStats(hits=1, misses=2, evictions=0, num_adapters=1, bytes=3)


@pytest.mark.parametrize(("max_bytes", "max_adapters", "named"), [(0, 1, "max_bytes"), (1, 0, "max_adapters")])
def test_a_cache_without_room_is_refused(max_bytes: int, max_adapters: int, named: str) -> None:
    with pytest.raises(AdapterError, match=rf"^{named}: expected at least 1, got 0; "):
        cache_of(lambda model, adapter: "", max_bytes, max_adapters)
