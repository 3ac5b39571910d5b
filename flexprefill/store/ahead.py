"""Work in threads beside the caller. Files, checksums and bits hold Python's lock for a short time only."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(work: Callable[[Item], Result], items: Iterable[Item], *, threads: int = 1) -> Generator[Result, None, None]:
    """The results of ``work`` on each item, in order. Threads go on working while the caller uses a result."""
    with ThreadPoolExecutor(threads, "flexprefill-masks") as pool:
        begun: deque[Future[Result]] = deque()
        for item in items:
            begun.append(pool.submit(work, item))
            if len(begun) > threads:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
