import tracemalloc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any


def peak_memory(prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> int:
    """The bytes that Python holds at most at a time while it does what `prepare(*arguments)` returns.

    In a fresh process: in that of the tests, threads that earlier tests have left allocate as well.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_trace, prepare, *arguments).result()


def _trace(prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> int:
    action = prepare(*arguments)
    tracemalloc.start()
    action()
    return tracemalloc.get_traced_memory()[1]
