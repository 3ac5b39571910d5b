"""flexprefill eval: does a model still find the needle."""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from flexprefill.cli.table import print_table
from flexprefill.cli.values import list_of, parse_device, parse_share, whole
from flexprefill.config import PrefillConfig, check_alphas
from flexprefill.errors import FlexPrefillError
from flexprefill.evaluation import TASKS, ModelSizes, load_model, read_text
from flexprefill.evaluation.comparison import TEXT, Cell, Plan, compare
from flexprefill.evaluation.methods import DENSE, KINDS, make_methods
from flexprefill.evaluation.report import accuracy_points, table
from flexprefill.plotting import plot_accuracy
from flexprefill.runtime.progress import stage

DESCRIPTION = (
    "Asks a small long-context model RULER-like questions (needles, variables, common words) and measures its "
    "next-token loss on held-out text, with dense attention and with blocks chosen by each method at each alpha. "
    "All methods of an alpha keep as many blocks in each row as FlashPrefill does there: 'exact' those with the most "
    "attention mass, the best that any choice could do, 'random' any, beside sinks and window. Prints accuracies with "
    "95 % confidence intervals, densities, kept attention mass and times; writes every figure to eval.json as soon as "
    "it is there, from which an interrupted run goes on, and, with matplotlib, draws eval.png. The text is this "
    "machine's own source code and documentation. Lists are separated by commas."
)
MIN_LENGTH = 256
TEXT_BYTES = 2**22


def add_arguments(parser: argparse.ArgumentParser) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lists: dict[str, tuple[Callable[[str], Any], str, str, str]] = {
        "lengths": (whole(MIN_LENGTH), "TOKENS", "4096,8192,16384,32768", f"at least {MIN_LENGTH} each"),
        "alphas": (parse_share, "SHARES", "0.05,0.1,0.2,0.5", "of the search"),
        "methods": (str, "NAMES", ",".join((DENSE, *KINDS)), "to compare"),
        "tasks": (str, "NAMES", ",".join((*TASKS, TEXT)), "to ask"),
    }
    parser.add_argument("--model", type=Path, required=True, metavar="FILE", help="a model of train_needle_model.py")
    for name, (parse, metavar, default, meaning) in lists.items():
        parser.add_argument(
            "--" + name, type=list_of(parse), metavar=metavar, default=default, help=f"{meaning} (default: {default})"
        )
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        metavar="FILE",
        default=[],
        help="of 'flexprefill calibrate', to compare too; may be given more than once",
    )
    parser.add_argument(
        "--samples",
        type=whole(1),
        metavar="N",
        default="200",
        help="of each task at each length, the same for every method (default: %(default)s)",
    )
    parser.add_argument("--seed", type=whole(0), default="0", help="of the samples (default: %(default)s)")
    parser.add_argument(
        "--device", type=parse_device, default=device, help=f"cpu, cuda or cuda:N (default: {device} here)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        default="./flexprefill-eval",
        help="folder for eval.json and eval.png, made if missing (default: %(default)s)",
    )


def execute(arguments: argparse.Namespace) -> int:
    known = (*TASKS, TEXT)
    if unknown := [name for name in arguments.tasks if name not in known]:
        arguments.parser.error(f"argument --tasks: must be of {', '.join(known)}, got {', '.join(map(repr, unknown))}")
    calibrated = _load_configs(arguments.config)
    try:
        methods = make_methods(arguments.alphas, arguments.methods, PrefillConfig(), calibrated)
    except ValueError as error:
        arguments.parser.error(f"argument --methods: {error}")
    model = load_model(arguments.model, arguments.device)
    _check_fit(calibrated, model.sizes)
    arguments.output.mkdir(parents=True, exist_ok=True)
    plan = Plan(arguments.lengths, arguments.tasks, methods, arguments.samples, arguments.seed)
    text = read_text(TEXT_BYTES, held_out=True)
    figures, picture = arguments.output / "eval.json", arguments.output / "eval.png"
    with stage("asking", len(plan.cells)) as advance:
        cells = compare(model, zlib.crc32(arguments.model.read_bytes()), text, plan, figures, advance)
    _print(cells, plan)
    try:
        plot_accuracy(accuracy_points(cells), picture, title="Exact answers against kept blocks")
        drawn = str(picture)
    except FlexPrefillError as error:
        drawn = f"skipped: {error}"
    print(f"figures  {figures}\npicture  {drawn}")
    return 0


def _load_configs(paths: Sequence[Path]) -> dict[str, dict[int, PrefillConfig]]:
    """What files of flexprefill calibrate hold, by their names, which stand in the table."""
    found: dict[str, dict[int, PrefillConfig]] = {}
    for path in paths:
        if path.stem in found:
            raise FlexPrefillError(f"{path} must have another name, {path.stem!r} is that of an earlier --config")
        found[path.stem] = PrefillConfig.load_layers(path)
    return found


def _check_fit(calibrated: dict[str, dict[int, PrefillConfig]], sizes: ModelSizes) -> None:
    """Raises FlexPrefillError unless all configs are for each of the model's layers and heads."""
    for name, layers in calibrated.items():
        if len(layers) != sizes.layers:
            raise FlexPrefillError(f"--config {name} must be of the model's {sizes.layers} layers, got {len(layers)}")
        for layer, config in layers.items():
            try:
                check_alphas(config, sizes.heads, sizes.kv_heads)
            except ValueError as error:
                raise FlexPrefillError(f"--config {name} does not fit the model's layer {layer}: {error}") from None


def _print(cells: list[Cell], plan: Plan) -> None:
    for length in plan.lengths:
        print(f"{length:,} tokens")
        print_table(*table([cell for cell in cells if cell.length == length]))
        print()
