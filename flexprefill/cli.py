"""The command line: parses the arguments and calls the library."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from flexprefill import demo
from flexprefill._version import __version__
from flexprefill.config import PrefillConfig
from flexprefill.errors import FlexPrefillError

MIN_LENGTH = 1024
DEFAULT_LENGTH = {"cpu": 16_384, "cuda": 131_072}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``flexprefill`` with these arguments (the process's own if None) and returns the exit code 0.

    Raises:
        SystemExit: with code 0 after ``--help`` and ``--version``, with code 2 after an argument that does not
            fit, and whatever else the library refuses.
    """
    parser = argparse.ArgumentParser(prog="flexprefill", description="Block-sparse prefill attention for PyTorch.")
    parser.add_argument("--version", action="version", version=f"flexprefill {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo_parser = commands.add_parser(
        "demo",
        help="find, time and draw the blocks that matter in real text",
        description=(
            "Builds four attention heads (local, sink, induction, topic) from the source of Python's standard "
            "library, without trained weights, and finds the blocks that matter to each. Prints for each head how "
            "many blocks are kept, how much of the exact attention they hold and the error of the output, then "
            "the times of dense and of sparse attention; saves the masks and, with matplotlib, draws them. "
            "Takes a minute or two on two CPU cores."
        ),
    )
    _add_demo_arguments(demo_parser)
    arguments = parser.parse_args(argv)

    length = arguments.length or DEFAULT_LENGTH[arguments.device.type]
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        demo.run(length, arguments.config, arguments.device, arguments.output, arguments.seed)
    except (FlexPrefillError, OSError) as error:
        demo_parser.error(str(error))
    return 0


def _add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    lengths = ", ".join(f"{length} on {device}" for device, length in DEFAULT_LENGTH.items())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--length",
        type=_length,
        metavar="TOKENS",
        help=f"tokens of text, at least {MIN_LENGTH} (default: {lengths})",
    )
    parser.add_argument(
        "--alpha",
        dest="config",
        type=_config,
        metavar="SHARE",
        default="0.1",
        help="a block is kept if its score is at least this share of its row's best (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        default="./flexprefill-demo",
        help="folder for the masks and the picture, made if missing (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        type=_device,
        default=device,
        help=f"cpu (float32), cuda or cuda:N (bfloat16) (default: {device} here)",
    )
    parser.add_argument("--seed", type=_seed, default="0", help="of the token embeddings (default: %(default)s)")


def _length(text: str) -> int:
    length = _integer(text)
    if length < MIN_LENGTH:
        raise argparse.ArgumentTypeError(f"must be at least {MIN_LENGTH}, got {length}")
    return length


def _seed(text: str) -> int:
    seed = _integer(text)
    if not 0 <= seed < 2**63:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 2**63, got {seed}")
    return seed


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def _config(alpha: str) -> PrefillConfig:
    try:
        return PrefillConfig(alpha=float(alpha))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and at most 1, got {alpha!r}") from None


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in DEFAULT_LENGTH:
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text} is not there; PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return device
