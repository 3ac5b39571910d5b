"""What the library holds for the whole process, in one list, and how a test puts it back.

*Remembered* facts would otherwise be found out anew by each call: a choice, a device's properties, a compiled function.
Everything that a result depends on is part of its key. So forgetting costs time and changes nothing.

*Registered* things were made known by a caller by name, such as a scorer.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

Remembering = TypeVar("Remembering", bound=Callable[..., Any])
Thing = TypeVar("Thing")

_forgetting: dict[str, Callable[[], object]] = {}
_registries: dict[str, Callable[[], object]] = {}


def remembered(what: str, *, most: int) -> Callable[[Remembering], Remembering]:
    """Keeps a function's ``most`` recently used results for the process. Its arguments must have hashes."""

    def decorate(function: Remembering) -> Remembering:
        cached = functools.lru_cache(maxsize=most)(function)
        _forgetting[what] = cached.cache_clear
        return cached  # type: ignore[return-value]  # callers see the function's own signature

    return decorate


class Remembered(Generic[Thing]):
    """As `remembered`, for what is made of things that cannot be kept, such as tensors, and depends on a key alone."""

    def __init__(self, what: str, *, most: int) -> None:
        self._most = most
        self._held: dict[Hashable, Thing] = {}
        self._turn = threading.Lock()
        _forgetting[what] = self._held.clear

    def find(self, key: Hashable) -> Thing | None:
        """What is kept for a key, if anything is."""
        return self._held.get(key)

    def get(self, key: Hashable, make: Callable[[], Thing]) -> Thing:
        """What was made first for a key. Nothing is kept if it cannot be made. The oldest goes where there are more."""
        found = self._held.get(key)
        if found is None:
            found = make()
            with self._turn:
                self._make_room(key)
                found = self._held.setdefault(key, found)
        return found

    def keep(self, key: Hashable, thing: Thing) -> None:
        """Keeps a thing for a key in place of another."""
        with self._turn:
            self._make_room(key)
            self._held[key] = thing

    def _make_room(self, key: Hashable) -> None:
        if key not in self._held and len(self._held) >= self._most:
            self._held.pop(next(iter(self._held)))


def registered(what: str, reset: Callable[[], object]) -> None:
    """Enters a registry into the list. ``reset`` leaves in it only what the library itself put there."""
    _registries[what] = reset


def forget(*names: str) -> None:
    """Forgets or resets what is named. Without names, forgets all remembered results."""
    for name in names or tuple(_forgetting):
        (_forgetting.get(name) or _registries[name])()
