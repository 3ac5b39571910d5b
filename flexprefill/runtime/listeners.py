"""Who hears of the maps that are used. The search, the attention and BlockMap tell; a recording listens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

from flexprefill.runtime.tracing import is_tracing


class Listener(Protocol):
    """It is told in the thread that uses the map."""

    def hear_map(self, block_map: Any, searched: Any, mask_mods: tuple[Any, ...]) -> None:
        """A BlockMap is about to be used.

        Args:
            block_map: What is kept of it.
            searched: The same before masks emptied blocks of it.
            mask_mods: Masks of which its attention was not told.
        """

    def hear_attention(self, attention: Any, config: Any) -> None:
        """Of which attention, a PlainAttention, the next map is, and which PrefillConfig chose it, if any did."""

    def hear_guard(self, report: Any) -> None:
        """The guard's GuardReport on a map that is about to be used."""


_listening: dict[int, Listener] = {}  # by id: recordings of equal maps are equal


@contextlib.contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Tells a listener, from every thread, to the end of the block."""
    _listening[id(listener)] = listener
    try:
        yield
    finally:
        del _listening[id(listener)]


def is_recording() -> bool:
    """Whether anyone listens."""
    return bool(_listeners())


def _listeners() -> tuple[Listener, ...]:
    return tuple(_listening.values()) if _listening and not is_tracing() else ()


def note(block_map: Any, searched: Any = None, mask_mods: tuple[Any, ...] = ()) -> None:
    """Tells the listeners that a BlockMap is about to be used; see ``Listener.hear_map``."""
    for listener in _listeners():
        listener.hear_map(block_map, block_map if searched is None else searched, mask_mods)


def note_attention(attention: Any, config: Any = None) -> None:
    """Tells the listeners of which attention the next map is, and which settings chose it."""
    for listener in _listeners():
        listener.hear_attention(attention, config)


def note_guard(report: Any) -> None:
    """Tells the listeners what the guard saw of a map that is about to be noted."""
    for listener in _listeners():
        listener.hear_guard(report)
