"""flexprefill calibrate: finds an alpha for each head of a model."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Generator

from flexprefill.cli.table import print_table
from flexprefill.cli.values import parse_device, parse_share, whole
from flexprefill.config import PrefillConfig, save_layers
from flexprefill.errors import FlexPrefillError
from flexprefill.evaluation import load_model, passages, read_text
from flexprefill.evaluation.calibration import calibrate_decoder, steps_of
from flexprefill.runtime.progress import stage

DESCRIPTION = (
    "Finds, for each layer and head of a model of train_needle_model.py, the largest alpha with which the search keeps "
    "a share of the exact attention mass on every one of some texts, and writes them to a JSON file that "
    "PrefillConfig.load_layers reads and 'flexprefill eval --config' compares. The texts are this machine's own source "
    "code and documentation, from files that the model was not trained on, or a file of yours. For other models call "
    "flexprefill.evaluation.calibrate with their queries and keys."
)
TEXT_BYTES = 2**22
MIN_LENGTH = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--model", type=Path, required=True, metavar="FILE", help="a model of train_needle_model.py")
    parser.add_argument(
        "--recall",
        type=parse_share,
        metavar="SHARE",
        default="0.95",
        help="of the attention mass that each head is to keep (default: %(default)s)",
    )
    parser.add_argument(
        "--length", type=whole(MIN_LENGTH), metavar="TOKENS", default="8192", help="of a text (default: %(default)s)"
    )
    parser.add_argument("--texts", type=whole(1), metavar="N", default="4", help="(default: %(default)s)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="takes the texts from this file, byte by byte")
    parser.add_argument("--seed", type=whole(0), default="0", help="of the texts' places (default: %(default)s)")
    parser.add_argument(
        "--device", type=parse_device, default=device, help=f"cpu, cuda or cuda:N (default: {device} here)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        default="./calibrated.json",
        help="its folder is made if missing (default: %(default)s)",
    )


def execute(arguments: argparse.Namespace) -> int:
    if arguments.recall >= 1:
        arguments.parser.error(f"argument --recall: must be below 1, got {arguments.recall:g}")
    model = load_model(arguments.model, arguments.device)
    text = read_text(TEXT_BYTES, held_out=True) if arguments.text is None else _read(arguments.text)
    if text.numel() < arguments.length:
        raise FlexPrefillError(f"the text must have at least {arguments.length} bytes, got {text.numel()}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    generator = Generator().manual_seed(arguments.seed)
    tokens = passages(text, generator, arguments.texts, arguments.length).to(arguments.device)
    with stage("calibrating", steps_of(len(model.layers))) as advance:
        configs = calibrate_decoder(model, tokens.split(1), arguments.recall, PrefillConfig(), advance=advance)
    save_layers(
        arguments.output,
        configs,
        recall=arguments.recall,
        command=arguments.command,
        length=arguments.length,
        texts=arguments.texts,
    )
    by_layer = [config.alpha if isinstance(config.alpha, tuple) else (config.alpha,) for config in configs]
    rows = [[str(layer), *(f"{alpha:.3g}" for alpha in alphas)] for layer, alphas in enumerate(by_layer)]
    print_table(["layer", *(f"head {head}" for head in range(len(by_layer[0])))], rows)
    print(f"written to {arguments.output}")
    return 0


def _read(path: Path) -> torch.Tensor:
    return torch.frombuffer(bytearray(path.read_bytes() or b" "), dtype=torch.uint8)
