"""Threads that are not waited for once nobody wants what they do, as after Ctrl-C."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

__all__ = ["workers"]


@contextmanager
def workers(number: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """So many threads for the time of the context. At its end they are done; where it ends by an error they may still
    wait for a server's answer, which nobody reads, and begin nothing new.
    """
    pool = ThreadPoolExecutor(number, thread_name_prefix=name)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
