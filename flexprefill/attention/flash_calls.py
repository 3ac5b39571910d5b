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

from flexprefill.runtime.arguments import Arguments
from flexprefill.runtime.state import Remembered

CONSTANTS = (int, float, bool, type(None))

_turn = threading.Lock()  # threads that find a kind of call new at once would all compile it


class Known(NamedTuple):
    """A compiled function and its arguments."""

    function: Any
    arguments: Arguments


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
            known.function(*known.arguments.filled(tensors))
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
    which = {_view_of(tensor): place for place, tensor in enumerate(tensors) if tensor is not None}
    if len(which) < sum(tensor is not None for tensor in tensors) or not _is_known(arguments):
        return None  # two tensors cannot be told apart, or something may hold one
    try:
        return Known(function, Arguments.of(arguments, lambda tensor: which[_view_of(tensor)]))
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


def _is_known(argument: Any) -> bool:
    """Whether it is a tensor, a constant, or a tuple of both."""
    if isinstance(argument, (tuple, list)):
        return all(map(_is_known, argument))
    return isinstance(argument, Tensor) or type(argument) in CONSTANTS
