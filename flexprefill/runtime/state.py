"""What the library remembers for the whole process, in one list, and how a test makes it forget.

Each entry holds facts that calls would otherwise find out anew: a choice, a device's properties, a compiled function.
What a result depends on is always part of the key, so forgetting costs time and changes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Remembering = TypeVar("Remembering", bound=Callable[..., Any])

_forgetting: dict[str, Callable[[], object]] = {}


def remembered(what: str, *, most: int) -> Callable[[Remembering], Remembering]:
    """Keeps a function's results for the process, the ``most`` recently used ones. Arguments must have hashes."""

    def decorate(function: Remembering) -> Remembering:
        cached = functools.lru_cache(maxsize=most)(function)
        _forgetting[what] = cached.cache_clear
        return cached  # type: ignore[return-value]  # callers see the function's own signature

    return decorate


def process_state() -> Iterator[str]:
    """What is remembered, by name."""
    yield from _forgetting


def forget(*names: str) -> None:
    """Forgets what is named, or everything."""
    for name in names or tuple(_forgetting):
        _forgetting[name]()
