"""What the library holds for the whole process, in one list, and how a test puts it back.

*Remembered* facts would otherwise be found out anew by each call: a choice, a device's properties, a compiled function.
Everything that a result depends on is part of its key. So forgetting costs time and changes nothing.

*Registered* things were made known by a caller by name, such as a scorer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

Remembering = TypeVar("Remembering", bound=Callable[..., Any])

_forgetting: dict[str, Callable[[], object]] = {}
_registries: dict[str, Callable[[], object]] = {}


def remembered(what: str, *, most: int) -> Callable[[Remembering], Remembering]:
    """Keeps a function's ``most`` recently used results for the process. Its arguments must have hashes."""

    def decorate(function: Remembering) -> Remembering:
        cached = functools.lru_cache(maxsize=most)(function)
        _forgetting[what] = cached.cache_clear
        return cached  # type: ignore[return-value]  # callers see the function's own signature

    return decorate


def registered(what: str, reset: Callable[[], object]) -> None:
    """Enters a registry into the list. ``reset`` leaves in it only what the library itself put there."""
    _registries[what] = reset


def forget(*names: str) -> None:
    """Forgets or resets what is named. Without names, forgets all remembered results."""
    for name in names or tuple(_forgetting):
        (_forgetting.get(name) or _registries[name])()
