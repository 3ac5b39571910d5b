"""flexprefill demo."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from flexprefill.cli import demo_run as demo
from flexprefill.cli.values import parse_device, parse_integer, parse_share
from flexprefill.config import PrefillConfig

NAME = "demo"
SUMMARY = "find, time and draw the blocks that matter in real text"
DESCRIPTION = (
    "Builds four attention heads (local, sink, induction, topic) from the source of Python's standard library, "
    "without trained weights, and finds the blocks that matter to each. Prints for each head how many blocks are "
    "kept, how much of the exact attention they hold and the error of the output, then the times of dense and of "
    "sparse attention; saves the masks and, with matplotlib, draws them. Takes a minute or two on two CPU cores."
)
MIN_LENGTH = 1024
DEFAULT_LENGTH = {"cpu": 16_384, "cuda": 131_072}


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
        type=parse_device,
        default=device,
        help=f"cpu (float32), cuda or cuda:N (bfloat16) (default: {device} here)",
    )
    parser.add_argument("--seed", type=_seed, default="0", help="of the token embeddings (default: %(default)s)")


def execute(arguments: argparse.Namespace) -> int:
    arguments.output.mkdir(parents=True, exist_ok=True)
    length = arguments.length or DEFAULT_LENGTH[arguments.device.type]
    demo.run(length, arguments.config, arguments.device, arguments.output, arguments.seed)
    return 0


def _length(text: str) -> int:
    length = parse_integer(text)
    if length < MIN_LENGTH:
        raise argparse.ArgumentTypeError(f"must be at least {MIN_LENGTH}, got {length}")
    return length


def _seed(text: str) -> int:
    seed = parse_integer(text)
    if not 0 <= seed < 2**63:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 2**63, got {seed}")
    return seed


def _config(alpha: str) -> PrefillConfig:
    return PrefillConfig(alpha=parse_share(alpha))
