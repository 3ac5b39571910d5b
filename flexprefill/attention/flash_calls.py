"""FlashAttention-4's compiled functions. Its entry finds one, and tensors of the same layout then call that right away.

The entry is Python, and takes several times as long as the function that it calls.

Private to flash-attn-4 4.0.0b10: the entry below its autograd function, which torch's own FlexAttention calls, and the
entry's cache of compiled functions. Where there is no such cache, each call takes the entry.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexprefill.runtime.state import Remembered

CONSTANTS = (int, float, bool, type(None))

_turn = threading.Lock()  # threads that find a kind of call new at once would all compile it


class Place(NamedTuple):
    """Which of a call's tensors stands here."""

    which: int


class Known(NamedTuple):
    """A compiled function and its arguments."""

    function: Any
    arguments: tuple[Any, ...]  # constants, and anything where a tensor is filled in
    places: list[tuple[int, int]]  # which argument is which of a call's tensors
    inner: list[tuple[int, tuple[Any, ...]]]  # which argument is a tuple, and its constants and Places

    @classmethod
    def of(cls, function: Any, arguments: tuple[Any, ...]) -> Known:
        """With constants, Places and tuples of both as arguments."""
        places = [(at, one.which) for at, one in enumerate(arguments) if type(one) is Place]
        inner = [(at, one) for at, one in enumerate(arguments) if type(one) is tuple]
        return cls(function, arguments, places, inner)

    def run(self, tensors: Sequence[Tensor | None]) -> None:
        filled = list(self.arguments)
        for at, which in self.places:
            filled[at] = tensors[which]
        for at, several in self.inner:
            filled[at] = tuple([tensors[one.which] if type(one) is Place else one for one in several])
        self.function(*filled)


_known: Remembered[Known] = Remembered("FlashAttention-4's functions, by layout", most=1024)


def call_flash(
    tensors: Sequence[Tensor | None], settings: Callable[[], dict[str, Any]], kind: Hashable | None = None
) -> None:
    """Runs FlashAttention-4's kernel on the current stream.

    Args:
        tensors: Query, key and value [B, S, H, D], the memory for the output and, or None, that for log-sum-exps, and
            any tensors that stand in settings.
        settings: Gives what the entry is told besides.
        kind: All that the settings and the layouts of the tensors depend on. None if that is not known.
    """
    # kernels are launched on the current device, and the tensors may be on another
    with torch.cuda.device_of(tensors[0]):
        known = None if kind is None else _known.find(kind)
        if known is not None:
            known.run(tensors)
            return
        with _turn:
            found = _enter(tensors, settings())
        if not (kind is None or found is None):
            _known.keep(kind, found)


def _enter(tensors: Sequence[Tensor | None], settings: dict[str, Any]) -> Known | None:
    """Calls the entry. Returns the function that it called, if that can be told."""
    from flash_attn.cute.interface import _flash_attn_fwd as entry  # an optional package

    query, key, value, output, lse, *_ = tensors
    enter = partial(entry, query, key, value, out=output, lse=lse, return_lse=lse is not None, **settings)
    cache = getattr(entry, "compile_cache", None)
    if cache is None:
        enter()
        return None
    entry.compile_cache = watched = Watched(cache)
    try:
        enter()
    finally:
        entry.compile_cache = cache
    if len(watched.calls) != 1:
        return None
    function, arguments = watched.calls[0]
    try:
        return Known.of(function, _with_places(arguments, _places_of(tensors), inner=True))
    except LookupError:
        return None


class Watched:
    """A cache of compiled functions that tells of calls of them."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __contains__(self, key: Any) -> bool:
        return key in self._cache

    def __setitem__(self, key: Any, function: Any) -> None:
        self._cache[key] = function

    def __getitem__(self, key: Any) -> Any:
        function = self._cache[key]

        def call(*arguments: Any) -> Any:
            self.calls.append((function, arguments))
            return function(*arguments)

        return call


def _view_of(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _places_of(tensors: Sequence[Tensor | None]) -> dict[tuple[Any, ...], Place]:
    """Raises LookupError if two tensors cannot be told apart."""
    views = [(_view_of(tensor), Place(which)) for which, tensor in enumerate(tensors) if tensor is not None]
    places = dict(views)
    if len(places) < len(views):
        raise LookupError("two tensors are the same")
    return places


def _with_places(arguments: Sequence[Any], places: dict[tuple[Any, ...], Place], inner: bool) -> tuple[Any, ...]:
    """Raises LookupError for what is neither a constant nor one of the tensors, nor, if inner, a tuple of them."""

    def placed(argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return places[_view_of(argument)]
        if inner and isinstance(argument, (tuple, list)):
            return _with_places(argument, places, inner=False)
        if type(argument) in CONSTANTS:
            return argument
        raise LookupError(f"an argument is a {type(argument).__name__}")

    return tuple([placed(argument) for argument in arguments])
