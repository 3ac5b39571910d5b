"""Triton's tensor descriptors apart from their tensors. To make and check one anew takes Triton 8 µs."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def without_tensor(descriptor: Any) -> dict[str, Any]:
    """A descriptor's settings. With its tensor they would keep that one's memory."""
    return {name: setting for name, setting in vars(descriptor).items() if name != "base"}


def with_tensor(kind: type, settings: dict[str, Any], tensor: Tensor) -> Any:
    """A descriptor of a tensor by checked settings, of a tensor of the same layout."""
    descriptor: Any = object.__new__(kind)
    vars(descriptor).update(settings, base=tensor)
    return descriptor
