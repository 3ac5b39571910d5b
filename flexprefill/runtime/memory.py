"""Asks for a step's memory before the step begins, so nothing is left half done."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from flexprefill.errors import FlexPrefillError

PIECE = 2**24  # elements that plain PyTorch holds at a time
WORTH_ASKING = 2**28  # bytes; asking takes about 0.1 ms, so smaller steps just allocate
IN_CHUNKS = "take the queries in chunks (examples/prefill_in_chunks.py)"


class NotEnoughMemoryError(FlexPrefillError, torch.OutOfMemoryError):
    """A search or the lists of a map do not fit into memory. Nothing was begun. The message says what would fit."""


def room_for(step: str, needed: int, device: torch.device, instead: str) -> AbstractContextManager[None]:
    """The block allocates a step's memory. Raises before it begins if the memory is not there.

    It does not wait for the device.

    Args:
        step: What the memory is for.
        needed: Bytes, at least.
        device: Where the memory is.
        instead: What the caller can do if it is not there.

    Raises:
        NotEnoughMemoryError: There is less memory, or it is in pieces.
    """
    check_room(step, needed, device, instead)
    return _Room(step, needed, device, instead)


class _Room(AbstractContextManager[None]):
    """A class, because each call of prefill_attention enters several, and a generator takes three times as long."""

    def __init__(self, *wanted: Any) -> None:
        self._wanted = wanted

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, torch.OutOfMemoryError) and not isinstance(error, NotEnoughMemoryError):
            step, needed, device, instead = self._wanted
            raise NotEnoughMemoryError(
                _message(step, needed, device, "the allocator does not find them in one piece", instead)
            ) from error


def check_room(step: str, needed: int, device: torch.device, instead: str) -> None:
    """Raises NotEnoughMemoryError if a device does not have the memory that a step needs; see `room_for`."""
    if needed < WORTH_ASKING:
        return
    free = free_bytes(device)
    if free is not None and needed > free:
        raise NotEnoughMemoryError(_message(step, needed, device, f"{free:,} are free", instead))


def free_bytes(device: torch.device) -> int | None:
    """Bytes that could be allocated on a device now. None where that is not known."""
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return None
        on_device, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        allowed = int(total * torch.cuda.get_per_process_memory_fraction(device)) - reserved
        # memory that PyTorch holds and does not use is free as well
        return max(0, min(on_device, allowed)) + reserved - torch.cuda.memory_allocated(device)
    table = Path("/proc/meminfo")
    if device.type == "cpu" and table.exists():
        lines = (line.split() for line in table.read_text().splitlines())
        return next((1024 * int(line[1]) for line in lines if line[0] == "MemAvailable:"), None)
    return None


def _message(step: str, needed: int, device: torch.device, there: str, instead: str) -> str:
    return f"memory for {step} is not there: it takes {needed:,} bytes on {device}, and {there}; {instead}"
