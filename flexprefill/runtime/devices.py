"""Devices as a caller names them."""

from __future__ import annotations

from typing import Any

import torch

from flexprefill.runtime.state import remembered
from flexprefill.runtime.tracing import is_tracing


def check_device(device: Any) -> torch.device:
    """The device of a name.

    Raises:
        TypeError: It is no device and no name.
        ValueError: It names no device, or one that is not here.
    """
    if is_tracing():
        return device
    if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
        raise TypeError(f"device must be a torch.device or the name of one, got {device!r}")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be the name of one, such as 'cpu' or 'cuda:0', got {device!r}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device must be one that is here, got {str(found)!r} of {torch.cuda.device_count()} on CUDA")
    return found


@remembered("whether a device is Hopper", most=64)
def is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


@remembered("multiprocessors of a device", most=64)
def multiprocessors(device: torch.device) -> int:
    # Triton's interpreter runs programs one by one, and a few of them exercise the persistent loop
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
