"""Parsers of single values on the command line; each says what would be right."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def list_of(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A parser of values that are separated by commas."""
    return lambda text: [parse(part.strip()) for part in text.split(",")]


def whole(minimum: int) -> Callable[[str], int]:
    """A parser of whole numbers from ``minimum`` to below 2**31."""

    def parse(text: str) -> int:
        number = parse_integer(text)
        if not minimum <= number < 2**31:
            raise argparse.ArgumentTypeError(f"must be at least {minimum} and below 2**31, got {number}")
        return number

    return parse


def parse_share(text: str) -> float:
    """A number above 0 and at most 1."""
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:  # false for NaN as well
        raise argparse.ArgumentTypeError(f"must be a number above 0 and at most 1, got {text!r}")
    return share


def parse_integer(text: str) -> int:
    """A whole number of any size."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def parse_device(text: str) -> torch.device:
    """cpu or a CUDA device that is there."""
    import torch

    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text} is not there; PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return device
