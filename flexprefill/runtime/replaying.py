"""Work that is launches of kernels and nothing else, done again for other tensors of the same layout.

To work out a launch takes the host longer than to launch: sizes, settings and descriptors are found anew each time. So
the second run of a kind of work is recorded: the memory that it takes, and each kernel with its arguments. Later runs
take new memory and launch the same kernels.

Work is recorded only if that is all it does: a mode sees torch's other operators, and then nothing is recorded.

Private to torch 2.11 to 2.13: the module of TorchDispatchMode (no public one has it).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flexprefill.runtime.arguments import Arguments
from flexprefill.runtime.memory import IN_CHUNKS, room_for
from flexprefill.runtime.state import Remembered

if TYPE_CHECKING:
    from flexprefill.runtime.launching import Launch

Work = Callable[..., Sequence[Tensor]]

SEEN_ONCE = "recorded when it comes again, as recording takes longer than work of a length that never does"
NOT_RECORDED = "more than launches of kernels"
_recordings: Remembered[Recording | str] = Remembered("launches of whole steps", most=2048)

_thread = threading.local()

LONG = 65_536  # tokens from which the device takes longer than the host in any case

aten = torch.ops.aten
TAKE_MEMORY = frozenset((aten.empty.memory_format, aten.new_empty.default))
LOOK_AT_MEMORY = frozenset((aten.view.default, aten.detach.default, aten.transpose.int, aten.alias.default))


class Step(NamedTuple):
    """A launch without its tensors."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Arguments


class Recording(NamedTuple):
    """Launches for tensors of one layout. Tensors are counted: inputs first, then those of ``memory``."""

    memory: tuple[tuple[torch.Size, torch.dtype], ...]
    steps: tuple[Step, ...]
    results: tuple[int, ...]
    nbytes: int  # of the memory

    def replay(self, *inputs: Tensor) -> list[Tensor]:
        """What the work returned, for other inputs of the layout, on the current device and stream."""
        new_empty = inputs[0].new_empty
        tensors = [*inputs, *[new_empty(shape, dtype=dtype) for shape, dtype in self.memory]]
        for kernel, grid, arguments in self.steps:
            kernel[grid](*arguments.filled(tensors))
        return [tensors[which] for which in self.results]


def layouts_of(*tensors: Tensor) -> tuple[object, ...]:
    """All of tensors that launches depend on, besides their places in memory."""
    return tuple([(tensor.dtype, tensor.device, tensor.shape, tensor.stride()) for tensor in tensors])


def replayed(kind: Hashable, work: Work, *inputs: Tensor) -> Sequence[Tensor]:
    """What ``work(*inputs)`` returns, by recorded launches where that is possible.

    Args:
        kind: All that work depends on besides what inputs hold: settings, and the inputs' layouts. That they begin at
            multiples of 16 bytes is looked at here. Work may have replayed parts.
        work: What is done, on the inputs' device. In a replay its memory is held until it ends.
        inputs: The tensors that it reads, on one device.
    """
    if getattr(_thread, "recording", False):
        return work(*inputs)  # what is being recorded needs every launch
    places = [tensor.data_ptr() for tensor in inputs]
    kind = kind, tuple([place % 16 for place in places])
    recording = _recordings.find(kind)
    if isinstance(recording, Recording):
        room = room_for("the search and its index lists", recording.nbytes, inputs[0].device, IN_CHUNKS)
        # kernels are launched on the current device, and the tensors may be on another
        with room, torch.cuda.device_of(inputs[0]):
            return recording.replay(*inputs)
    if recording is SEEN_ONCE and len(set(places)) == len(places):
        results, found = record(work, *inputs)
        _recordings.keep(kind, found or NOT_RECORDED)
        return results
    if recording is None:
        _recordings.keep(kind, SEEN_ONCE)
    return work(*inputs)


def record(work: Work, *inputs: Tensor) -> tuple[Sequence[Tensor], Recording | None]:
    """What work returns, and its recording. None if it does more than to launch kernels on inputs and new memory."""
    from flexprefill.runtime.launching import launches_noted  # imports triton

    _thread.recording = True
    try:
        with _Watch() as watch, launches_noted() as launches:
            results = work(*inputs)
    finally:
        _thread.recording = False
    if not watch.only_memory:
        return results, None
    memory = [tensor for tensor in watch.taken if tensor.numel() > 0]
    try:
        return results, _recording_of(inputs, memory, launches, results)
    except LookupError:
        return results, None


class _Watch(TorchDispatchMode):
    """Sees what memory is taken, and whether anything else is done."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[Tensor] = []  # held, so that none of it is given out twice
        self.only_memory = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in TAKE_MEMORY:
            self.taken.append(found)
        elif func not in LOOK_AT_MEMORY:
            self.only_memory = False
        return found


def _recording_of(
    inputs: Sequence[Tensor], memory: Sequence[Tensor], launches: Sequence[Launch], results: Sequence[Tensor]
) -> Recording:
    """Raises LookupError where a tensor is none of inputs and memory, a part of one, or a result that is a view."""
    known = [*inputs, *memory]
    at = {tensor.data_ptr(): which for which, tensor in enumerate(known)}
    if len(at) < len(known):
        raise LookupError("two tensors begin at one place")

    def which(tensor: Tensor) -> int:
        found = at[tensor.data_ptr()]
        if (tensor.numel(), tensor.dtype) != (known[found].numel(), known[found].dtype):
            raise LookupError("a part of a tensor")
        return found

    for tensor in memory:
        if tensor.device != inputs[0].device or not tensor.is_contiguous():
            raise LookupError("memory of another kind")
    for tensor in results:
        if tensor.shape != known[which(tensor)].shape or not tensor.is_contiguous():
            raise LookupError("a view")
    steps = tuple([Step(kernel, grid, Arguments.of(arguments, which)) for kernel, grid, arguments in launches])
    taken = tuple((tensor.shape, tensor.dtype) for tensor in memory)
    return Recording(taken, steps, tuple(map(which, results)), sum(tensor.nbytes for tensor in memory))
