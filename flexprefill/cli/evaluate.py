"""flexprefill eval: does a model still find the needle."""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Sequence
from pathlib import Path

from flexprefill.cli.table import print_table
from flexprefill.cli.values import add_device, add_options, list_of, parse_share, whole
from flexprefill.config import PrefillConfig, check_alphas
from flexprefill.errors import FlexPrefillError
from flexprefill.evaluation import TASKS, ModelSizes, load_model, read_text
from flexprefill.evaluation.comparison import TEXT, Cell, Plan, compare
from flexprefill.evaluation.methods import DENSE, KINDS, make_methods
from flexprefill.evaluation.report import accuracy_points, table
from flexprefill.plotting import plot_accuracy
from flexprefill.runtime.progress import stage

NAME = "eval"
SUMMARY = "ask a small model long questions, dense and sparse"
DESCRIPTION = (
    "Asks a small long-context model RULER-like questions (needles, variables, common words) and measures its "
    "next-token loss on held-out text. Compares dense attention with the blocks that each method chooses at each "
    "alpha. All methods of an alpha keep as many blocks in each row as FlashPrefill does there. 'exact' keeps those "
    "with the most attention mass, the best possible choice. 'random' keeps any, beside sinks and window. Prints "
    "accuracies with 95 % confidence intervals, densities, kept attention mass and times. Writes each figure to "
    "eval.json as soon as it is measured; an interrupted run goes on from there. Draws eval.png if matplotlib is "
    "installed. The text is source code and documentation of this machine. Lists are separated by commas."
)
MIN_LENGTH = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="FILE", help="a model of train_needle_model.py")
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        metavar="FILE",
        default=[],
        help="also compare this file of 'flexprefill calibrate'; may be given more than once",
    )
    add_device(parser)
    lengths, methods, tasks = "4096,8192,16384,32768", ",".join((DENSE, *KINDS)), ",".join((*TASKS, TEXT))
    add_options(
        parser,
        ("--lengths", list_of(whole(MIN_LENGTH)), "TOKENS", lengths, f"prompt lengths, at least {MIN_LENGTH} each"),
        ("--alphas", list_of(parse_share), "SHARES", "0.05,0.1,0.2,0.5", "alphas of the search"),
        ("--methods", list_of(str), "NAMES", methods, "methods to compare"),
        ("--tasks", list_of(str), "NAMES", tasks, "tasks to ask"),
        ("--samples", whole(1), "N", "200", "samples of each task at each length, the same for every method"),
        ("--seed", whole(0), "N", "0", "seed of the samples"),
        ("--output", Path, "DIR", "./flexprefill-eval", "folder for eval.json and eval.png, made if missing"),
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
    text = read_text(held_out=True)
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
    """The configs of files of flexprefill calibrate, by their names in the table."""
    found: dict[str, dict[int, PrefillConfig]] = {}
    for path in paths:
        if path.stem in found:
            raise FlexPrefillError(f"{path} must have another name: an earlier --config is named {path.stem!r} too")
        found[path.stem] = PrefillConfig.load_layers(path)
    return found


def _check_fit(calibrated: dict[str, dict[int, PrefillConfig]], sizes: ModelSizes) -> None:
    """Raises FlexPrefillError unless all configs fit the model's layers and heads."""
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
