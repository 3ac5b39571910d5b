"""The private parts of torch that timing and CUDA graphs need."""

from __future__ import annotations

import contextlib

import torch


def occupy_device(cycles: int) -> None:
    """Queues a kernel that does nothing for so many clock cycles. The host gets ahead of the device meanwhile.

    torch has no public kernel that waits for a given time (2.11 to 2.13).
    """
    torch.cuda._sleep(cycles)


def end_broken_capture(pool: tuple[int, int]) -> None:
    """Ends the allocator's part in a capture that broke off, on the current device.

    torch 2.11 leaves its allocator in such a capture, and the next capture then fails (pytorch pull 180395). Where
    torch has ended it already, this does nothing. torch has no public way to give up a capture.

    Args:
        pool: The capture's pool, from torch.cuda.graph_pool_handle.
    """
    with contextlib.suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
