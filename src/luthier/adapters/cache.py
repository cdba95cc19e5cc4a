"""Adapters kept in memory, the least recently used given up first.

A server or a comparison asks for many adapters of a few models, of which only some fit into memory. The cache says
what it keeps, never what its users hold: an adapter that was given up stays valid for every thread that still has it.
Loading runs outside the lock, once per key however many threads ask, so that one slow adapter holds up only those who
want it.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

from luthier.errors import AdapterError

__all__ = ["AdapterCache", "CacheStats"]

T = TypeVar("T")
Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counts since the cache was made, and what it keeps now. hits + misses is the number of calls of `get`."""

    hits: int
    misses: int
    evictions: int
    num_adapters: int
    bytes: int


class AdapterCache(Generic[T]):
    """A thread-safe LRU of adapters by (model, adapter): at most `max_adapters` and at most `max_bytes` are kept."""

    def __init__(
        self, load: Callable[[str, str], T], *, size_bytes: Callable[[T], int], max_bytes: int, max_adapters: int
    ) -> None:
        """`load(model, adapter)` and `size_bytes(value)` are called by the thread that asks, outside the lock."""
        for name, bound in (("max_bytes", max_bytes), ("max_adapters", max_adapters)):
            if bound < 1:
                raise AdapterError(f"{name}: expected at least 1, got {bound}; leave the cache out to keep no adapter")
        self._load, self._size_bytes = load, size_bytes
        self._max_bytes, self._max_adapters = max_bytes, max_adapters
        self._lock = threading.Lock()
        self._kept: OrderedDict[Key, tuple[T, int]] = OrderedDict()  # oldest use first; value and bytes
        self._loading: dict[Key, Future[T]] = {}
        self._hits = self._misses = self._evictions = self._bytes = 0

    @property
    def stats(self) -> CacheStats:
        """All counts, of one instant."""
        with self._lock:
            return CacheStats(self._hits, self._misses, self._evictions, len(self._kept), self._bytes)

    def get(self, model: str, adapter: str) -> T:
        """The adapter, loaded if it is not kept; a thread that comes while another loads it waits and misses too.

        An adapter larger than `max_bytes` is returned and not kept. What `load` raises is raised in every thread that
        waited for it, and the next call tries again. `load` must not ask the cache for the key that it is loading.
        """
        key = (model, adapter)
        with self._lock:
            if key in self._kept:
                self._hits += 1
                self._kept.move_to_end(key)
                return self._kept[key][0]
            self._misses += 1
            first = key not in self._loading
            flight = self._loading.setdefault(key, Future())
        if first:
            self._fly(key, flight)
        return flight.result()

    def drop(self, model: str, adapter: str) -> None:
        """Forgets the adapter if it is kept. One that is being loaded goes to those who wait for it and is not kept."""
        key = (model, adapter)
        with self._lock:
            self._loading.pop(key, None)
            forgotten = self._kept.pop(key, None)
            self._bytes -= forgotten[1] if forgotten else 0

    def clear(self) -> None:
        """Forgets every adapter, as `drop` does; the counts of hits, misses and evictions go on."""
        with self._lock:
            self._loading.clear()
            forgotten, self._kept = self._kept, OrderedDict()
            self._bytes = 0
        forgotten.clear()  # frees what nobody else holds, outside the lock

    def _fly(self, key: Key, flight: Future[T]) -> None:
        """Loads for all who wait on the flight."""
        try:
            value = self._load(*key)
            size = self._size_bytes(value)
        except BaseException as error:
            self._land(key, flight, None)
            flight.set_exception(error)
        else:
            self._land(key, flight, (value, size))
            flight.set_result(value)

    def _land(self, key: Key, flight: Future[T], entry: tuple[T, int] | None) -> None:
        """Ends the flight and keeps what it brought, unless it brought too much or its key was dropped meanwhile."""
        evicted = []  # freed when this function ends, after the lock is released
        with self._lock:
            if self._loading.get(key) is not flight:
                return
            del self._loading[key]
            if entry is None or entry[1] > self._max_bytes:
                return
            self._kept[key] = entry
            self._bytes += entry[1]
            while len(self._kept) > self._max_adapters or self._bytes > self._max_bytes:
                evicted.append(self._kept.popitem(last=False)[1])
                self._bytes -= evicted[-1][1]
                self._evictions += 1
