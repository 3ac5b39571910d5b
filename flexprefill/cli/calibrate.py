"""flexprefill calibrate: finds the sparsest setting that costs a model little."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Generator

from flexprefill.cli.evaluate import DTYPES, LEAST_SHARE, check_context, load_subject
from flexprefill.cli.table import print_table
from flexprefill.cli.values import add_device, add_options, list_of, parse_positive, parse_share, whole
from flexprefill.config import PrefillConfig, save_layers
from flexprefill.errors import FlexPrefillError
from flexprefill.evaluation import load_model, passages, prompts, read_text
from flexprefill.evaluation.calibration import calibrate_decoder, steps_of
from flexprefill.evaluation.comparison import Plan
from flexprefill.evaluation.loss_calibration import Calibrator, Tried, calibrate_by_loss, tries
from flexprefill.runtime.progress import stage

DESCRIPTION = (
    "Finds the sparsest setting that costs a model little: an alpha for each layer and head, or one probe share. "
    "Writes it to a JSON file. PrefillConfig.load_layers reads that file, and 'flexprefill eval --config' compares it. "
    "With --loss the model is a pretrained one, and its own tokens decide. The sparsest setting is taken that costs at "
    "most so many milli-nats a token over dense attention, on each of the tasks of 'flexprefill eval'. The result is "
    "checked on prompts that were not used. "
    "With --recall the model is one of train_needle_model.py, and attention mass decides. Each head gets the largest "
    "alpha with which the search keeps a share of the exact attention mass on every text. That is quicker, and does "
    "not see what a lost key costs. For other models call flexprefill.evaluation.calibrate with queries and keys."
)
MIN_LENGTH = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="folder, name, GGUF file or needle model (.safetensors)"
    )
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument(
        "--loss", type=parse_positive, metavar="MILLINATS", help="what a token may cost over dense attention"
    )
    goal.add_argument(
        "--recall",
        type=parse_share,
        metavar="SHARE",
        help="the attention mass that each head must keep (default: 0.95)",
    )
    parser.add_argument(
        "--text", type=Path, nargs="+", metavar="FILE", default=[], help="your texts, instead of what Python has"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of a pretrained model, as in 'flexprefill eval'")
    parser.add_argument(
        "--tasks",
        type=list_of(str),
        metavar="NAMES",
        help=f"what --loss is measured on (default: all of {', '.join(prompts.TASKS)} that dense attention can do)",
    )
    add_device(parser)
    add_options(
        parser,
        ("--length", whole(MIN_LENGTH), "TOKENS", "8192", "length of a text"),
        ("--texts", whole(1), "N", "4", "number of texts, with --loss of each task"),
        ("--seed", whole(0), "N", "0", "seed of the texts' places"),
        ("--output", Path, "FILE", "./calibrated.json", "the JSON file; its folder is made if missing"),
    )


def execute(arguments: argparse.Namespace) -> int:
    own = arguments.model.endswith(".safetensors")
    if own and arguments.loss is not None:
        arguments.parser.error("argument --loss: needs a pretrained model, got a needle model's file; give --recall")
    if not own and arguments.loss is None:
        arguments.parser.error(
            "argument --loss: is needed for a pretrained model, such as --loss 5; --recall is for a needle model"
        )
    if unknown := [name for name in arguments.tasks or () if name not in prompts.TASKS]:
        arguments.parser.error(
            f"argument --tasks: must be of {', '.join(prompts.TASKS)}, got {', '.join(map(repr, unknown))}"
        )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    configs = _by_recall(arguments) if own else _by_loss(arguments)
    print_table(*_thresholds(configs))
    print(f"written to {arguments.output}")
    return 0


def _thresholds(configs: Sequence[PrefillConfig]) -> tuple[list[str], list[list[str]]]:
    """A table of what was found: the alphas of each layer's heads, or its probe share."""
    if configs[0].two_sided:
        return ["layer", "probe share"], [[str(layer), f"{of.probe_share:.3g}"] for layer, of in enumerate(configs)]
    by_layer = [config.alpha if isinstance(config.alpha, tuple) else (config.alpha,) for config in configs]
    heads = max(map(len, by_layer))
    rows = [
        [str(layer), *(f"{alpha:.3g}" for alpha in (alphas if len(alphas) == heads else alphas * heads))]
        for layer, alphas in enumerate(by_layer)
    ]
    return ["layer", *(f"head {head}" for head in range(heads))], rows


def _by_recall(arguments: argparse.Namespace) -> list[PrefillConfig]:
    recall = 0.95 if arguments.recall is None else arguments.recall
    if recall >= 1:
        arguments.parser.error(f"argument --recall: must be below 1, got {recall:g}")
    if len(arguments.text) > 1:
        arguments.parser.error(f"argument --text: must be one file for a needle model, got {len(arguments.text)}")
    model = load_model(arguments.model, arguments.device)
    text = _read(arguments.text[0]) if arguments.text else read_text(held_out=True)
    if text.numel() < arguments.length:
        raise FlexPrefillError(f"the text must have at least {arguments.length} bytes, got {text.numel()}")
    generator = Generator().manual_seed(arguments.seed)
    tokens = passages(text, generator, arguments.texts, arguments.length).to(arguments.device)
    with stage("calibrating", steps_of(len(model.layers))) as advance:
        configs = calibrate_decoder(model, tokens.split(1), recall, PrefillConfig(), advance=advance)
    _save(arguments, configs, recall=recall)
    return configs


def _by_loss(arguments: argparse.Namespace) -> list[PrefillConfig]:
    if arguments.length < prompts.MIN_LENGTH:
        arguments.parser.error(f"argument --length: must be at least {prompts.MIN_LENGTH}, got {arguments.length}")
    subject = load_subject(arguments)
    check_context(subject, [arguments.length])
    plan = Plan([arguments.length], arguments.tasks or prompts.TASKS, [], arguments.texts, arguments.seed)
    tried: list[Tried] = []
    with stage("calibrating", tries(plan)) as advance:
        calibrator = Calibrator(subject, plan, PrefillConfig(), advance)
        dense = calibrator.dense()
        beyond = [cell for cell in dense.values() if cell.share is not None and cell.share.value < LEAST_SHARE]
        left = [task for task in plan.tasks if task not in {cell.task for cell in beyond}]
        if not left:
            raise FlexPrefillError(f"--tasks must be some that dense attention can do, got {', '.join(plan.tasks)}")
        calibrator = replace(calibrator, plan=replace(plan, tasks=left))
        best = calibrate_by_loss(calibrator, dense, arguments.loss / 1000, tried.append)
        # other prompts of the same kind
        unseen = Calibrator(replace(subject, seed=arguments.seed + 1), calibrator.plan, PrefillConfig(), advance)
        checked = unseen.tried(f"{best.name}, unseen prompts", list(best.configs.values()), unseen.dense())
    for cell in beyond:
        print(f"left out: {cell.task} at {cell.length:,} tokens, of which dense attention answers {cell.share}")
    print("milli-nats a token over dense attention, with 95 % intervals over the prompts")
    print_table(["setting", "density", *left], [_row(setting) for setting in (*tried, checked)])
    print(f"taken: {best.name}, {100 * best.density:.1f} % of the blocks")
    if checked.worst > arguments.loss / 1000:
        print(
            f"warning: on unseen prompts it costs {1000 * checked.worst:.1f} milli-nats, more than {arguments.loss:g}: "
            "take more --texts or a smaller --loss"
        )
    _save(arguments, list(best.configs.values()), loss=arguments.loss, setting=best.name, tasks=left)
    return list(best.configs.values())


def _row(tried: Tried) -> list[str]:
    losses = [
        f"{1000 * over.mean:+.1f}" + ("" if over.half is None else f" ± {1000 * over.half:.1f}")
        for over in tried.over_dense.values()
    ]
    return [tried.name, f"{100 * tried.density:.1f} %", *losses]


def _save(arguments: argparse.Namespace, configs: Sequence[PrefillConfig], **notes: object) -> None:
    notes |= {"command": arguments.command, "length": arguments.length, "texts": arguments.texts}
    save_layers(arguments.output, configs, **notes)


def _read(path: Path) -> torch.Tensor:
    return torch.frombuffer(bytearray(path.read_bytes() or b" "), dtype=torch.uint8)
