"""What the library holds for the whole process, in one list, and how a test puts it back.

*Remembered* are facts that calls would otherwise find out anew: a choice, a device's properties, a compiled function.
What a result depends on is always part of the key, so forgetting costs time and changes nothing.

*Registered* is what a caller made known by name, such as a scorer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

Remembering = TypeVar("Remembering", bound=Callable[..., Any])

_forgetting: dict[str, Callable[[], object]] = {}
_registries: dict[str, Callable[[], object]] = {}


def remembered(what: str, *, most: int) -> Callable[[Remembering], Remembering]:
    """Keeps a function's results for the process, the ``most`` recently used ones. Arguments must have hashes."""

    def decorate(function: Remembering) -> Remembering:
        cached = functools.lru_cache(maxsize=most)(function)
        _forgetting[what] = cached.cache_clear
        return cached  # type: ignore[return-value]  # callers see the function's own signature

    return decorate


def registered(what: str, reset: Callable[[], object]) -> None:
    """Enters a registry into the list, with the function that leaves in it what the library itself put there."""
    _registries[what] = reset


def process_state() -> tuple[list[str], list[str]]:
    """The names of what is remembered, and of the registries."""
    return list(_forgetting), list(_registries)


def forget(*names: str) -> None:
    """Forgets or resets what is named; all that is remembered if nothing is."""
    for name in names or tuple(_forgetting):
        (_forgetting.get(name) or _registries[name])()
