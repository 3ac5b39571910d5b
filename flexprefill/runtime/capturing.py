"""What timing and CUDA graphs need of torch that is private, in one place."""

from __future__ import annotations

import contextlib

import torch


def occupy_device(cycles: int) -> None:
    """Queues a kernel that does nothing for so many clock cycles, in which the host gets ahead of the device.

    The public way that is missing: a kernel that waits for a given time. Seen with torch 2.11 to 2.13.
    """
    torch.cuda._sleep(cycles)


def end_broken_capture(pool: tuple[int, int]) -> None:
    """Ends the allocator's part in a capture that broke off, on the current device.

    torch 2.11 leaves its allocator in such a capture, and the next one then fails (pytorch pull 180395). Where torch
    has ended it already, this does nothing. The public way that is missing: giving up a capture that broke off.

    Args:
        pool: as torch.cuda.graph_pool_handle gave it, and the capture had it.
    """
    with contextlib.suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
