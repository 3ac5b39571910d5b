"""Calls that may not wait for the device."""

import contextlib

import torch


@contextlib.contextmanager
def waits_are_errors():
    """A call inside that waits for the GPU raises RuntimeError."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
