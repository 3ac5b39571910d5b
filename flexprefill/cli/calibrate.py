"""flexprefill calibrate: finds an alpha for each head of a model."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Generator

from flexprefill.cli.table import print_table
from flexprefill.cli.values import add_device, add_options, parse_share, whole
from flexprefill.config import PrefillConfig, save_layers
from flexprefill.errors import FlexPrefillError
from flexprefill.evaluation import load_model, passages, read_text
from flexprefill.evaluation.calibration import calibrate_decoder, steps_of
from flexprefill.runtime.progress import stage

NAME = "calibrate"
SUMMARY = "find alphas by layer and head that keep a share of the attention mass"
DESCRIPTION = (
    "Finds an alpha for each layer and head of a model of train_needle_model.py: the largest one with which the search "
    "keeps a share of the exact attention mass on every text. Writes them to a JSON file. PrefillConfig.load_layers "
    "reads that file, and 'flexprefill eval --config' compares it. The texts are source code and documentation of this "
    "machine, from files that the model was not trained on, or a file of yours. For other models call "
    "flexprefill.evaluation.calibrate with their queries and keys."
)
MIN_LENGTH = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="FILE", help="a model of train_needle_model.py")
    parser.add_argument("--text", type=Path, metavar="FILE", help="take the texts from this file, byte by byte")
    add_device(parser)
    add_options(
        parser,
        ("--recall", parse_share, "SHARE", "0.95", "the attention mass that each head must keep"),
        ("--length", whole(MIN_LENGTH), "TOKENS", "8192", "length of a text"),
        ("--texts", whole(1), "N", "4", "number of texts"),
        ("--seed", whole(0), "N", "0", "seed of the texts' places"),
        ("--output", Path, "FILE", "./calibrated.json", "the JSON file; its folder is made if missing"),
    )


def execute(arguments: argparse.Namespace) -> int:
    if arguments.recall >= 1:
        arguments.parser.error(f"argument --recall: must be below 1, got {arguments.recall:g}")
    model = load_model(arguments.model, arguments.device)
    text = read_text(held_out=True) if arguments.text is None else _read(arguments.text)
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
