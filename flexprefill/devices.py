"""Devices as a caller names them."""

from __future__ import annotations

import torch

from flexprefill.tracing import is_tracing


def check_device(device: object) -> torch.device:
    """The device of a name.

    Raises:
        TypeError, ValueError: it is no name of a device, or of one that is not here.
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
