"""Launches of Triton's kernels. Binding a launch's arguments takes Triton 9 to 23 µs, and is done once for a kind.

A launch returns the compiled kernel, which can then be launched by itself, as in Triton's tutorial of a fused softmax.
"""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import triton
from torch import Tensor

from flexprefill.runtime.state import Remembered
from flexprefill.runtime.thread_state import without_dispatch_modes

NOT_COMPILED_FOR = frozenset(("base", "shape", "strides"))  # of a tensor descriptor
NUMBERS = frozenset((int, float, bool, type(None)))


class Bound(NamedTuple):
    """A compiled kernel."""

    kernel: Any
    ordered: Callable[[tuple[Any, ...]], tuple[Any, ...]]  # a launch's arguments in the order of its parameters


class Launch(NamedTuple):
    """A launch as it can be made again: ``kernel[grid](*arguments)``."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]  # in the order of the kernel's parameters


_bound: Remembered[Bound] = Remembered("compiled kernels, by kind of launch", most=4096)
_thread = threading.local()


@contextlib.contextmanager
def launches_noted() -> Iterator[list[Launch]]:
    """Notes this thread's launches to the end of the block."""
    outer, _thread.noted = getattr(_thread, "noted", None), []
    try:
        yield _thread.noted
    finally:
        _thread.noted = outer


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
    """As ``kernel[grid](*arguments, **named)`` on the current device, which is the tensors'.

    Args:
        kernel: A function of triton.jit or gluon.jit that lives as long as the process.
        grid: How many programs.
        arguments: Tensors, tensor descriptors and numbers, one for each of the first parameters.
        named: The other parameters', and Triton's options.
    """
    noted, in_three = getattr(_thread, "noted", None), (*grid, 1, 1)[:3]
    if not isinstance(kernel, triton.JITFunction):  # the interpreter's, which compiles nothing
        with without_dispatch_modes():  # it copies tensors
            kernel[grid](*arguments, **named)
        if noted is not None:
            given = {**dict(zip(kernel.arg_names, arguments, strict=False)), **named}
            noted.append(Launch(kernel, in_three, tuple([given[name] for name in kernel.arg_names])))
        return
    values = (*arguments, *named.values())
    launched = False

    def launch_first() -> Bound:
        nonlocal launched
        launched = True
        compiled = kernel[grid](*arguments, **named)
        names = (*kernel.arg_names[: len(arguments)], *named)
        return Bound(compiled, operator.itemgetter(*map(names.index, kernel.arg_names)))

    # what Triton compiles for; 1, 1.0 and True are equal, and their types are not
    kinds = tuple([value if type(value) in NUMBERS else _kind_of(value) for value in values])
    bound = _bound.get((id(kernel), tuple(named), kinds, tuple(map(type, values))), launch_first)
    ordered = bound.ordered(values)
    if not launched:
        bound.kernel[in_three](*ordered)
    if noted is not None:
        noted.append(Launch(bound.kernel, in_three, ordered))


def _kind_of(argument: Any) -> tuple[object, ...]:
    """What Triton compiles for of a tensor or of a tensor descriptor."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.device, argument.data_ptr() % 16 == 0
    # Triton's versions have other settings of a descriptor
    settings = [value for name, value in vars(argument).items() if name not in NOT_COMPILED_FOR]
    return argument.base.dtype, argument.base.device, *map(_hashable, settings)


def _hashable(setting: object) -> object:
    return tuple(setting) if isinstance(setting, list) else setting
