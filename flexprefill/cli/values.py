"""Parsers of single values on the command line. Each says what would be right."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def list_of(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A parser of values separated by commas."""
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


def parse_positive(text: str) -> float:
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:  # false for NaN as well
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text!r}")
    return number


def parse_integer(text: str) -> int:
    """A whole number of any size."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def parse_device(text: str) -> torch.device:
    """The CPU, or a CUDA device of this machine."""
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


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option --device. Its default is CUDA where that is there."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", type=parse_device, default=device, help=f"cpu, cuda or cuda:N (default: {device} here)"
    )


def add_options(parser: argparse.ArgumentParser, *options: tuple[str, Callable[[str], Any], str, str, str]) -> None:
    """Options that have a default, each as (name, parser, metavar, default, meaning)."""
    for name, parse, metavar, default, meaning in options:
        help_text = f"{meaning} (default: %(default)s)"
        parser.add_argument(name, type=parse, metavar=metavar, default=default, help=help_text)
