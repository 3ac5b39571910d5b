"""flexprefill bench: times every part of a call, the whole and dense attention side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from flexprefill import bench
from flexprefill.bench.contestants import CONTESTANTS
from flexprefill.bench.measure import LONGEST_GRAPH
from flexprefill.bench.settings import DEFAULTS, DENSITIES, Settings, default_density
from flexprefill.bench.timing import GRAPH_CALLS, MIN_REPEATS
from flexprefill.cli.values import add_device, add_options, list_of, parse_integer, parse_share, whole
from flexprefill.config import PrefillConfig
from flexprefill.variant.inputs import DTYPES, HEAD_DIMS

DESCRIPTION = (
    "Times the parts of prefill_attention, the whole call and every dense attention of this machine. They take turns "
    "on the same inputs: random tensors with some structure, searched at the alpha that gives the density asked for. "
    "Prints medians, spreads and the reached share of the theoretical floor: matrix work, exponentials and bytes at "
    "the highest clocks that the driver names. Writes every repeat to bench.json. Draws bench.png if matplotlib is "
    f"installed. On CUDA, up to {LONGEST_GRAPH:,} tokens, {GRAPH_CALLS} calls at a time are timed in a CUDA graph; "
    "longer prompts are timed by events around one call. Whole calls are timed once more one by one, by the wall "
    "clock on an idle GPU. What cannot run is listed with the reason. Lists are "
    "separated by commas. On the CPU, the default sinks and window are one block each and no last blocks keep "
    "everything: PrefillConfig's defaults would keep more than the default density at any default length."
)
MIN_LENGTH = 128  # a block


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    lengths = {kind: list(known) for kind, known in DENSITIES.items()}
    densities = {kind: list(known.values()) for kind, known in DENSITIES.items()}
    names = "; ".join(f"on {kind}: {', '.join(known)}" for kind, known in CONTESTANTS.items())
    parser.add_argument("--only", type=list_of(str), metavar="NAMES", help=f"what to time (default: all {names})")
    parser.add_argument(
        "--lengths",
        type=list_of(whole(MIN_LENGTH)),
        metavar="TOKENS",
        help=f"prompt lengths, at least {MIN_LENGTH} each (default: {_by_device(lengths)})",
    )
    parser.add_argument(
        "--densities",
        type=list_of(parse_share),
        metavar="SHARES",
        help="shares of the causal blocks to keep, one for each length; sinks, window, last blocks and each row's best "
        f"block are always kept (default: {_by_device(densities)} for the default lengths, and for others in between)",
    )
    for name, parse, metavar, meaning in (
        ("heads", whole(1), "N", "query heads, a multiple of the key heads"),
        ("kv_heads", whole(1), "N", "key heads"),
        ("head_dim", _head_dim, "D", "a multiple of 8 from 16 to 256"),
        ("dtype", _dtype, "DTYPE", ", ".join(map(_shown, DTYPES))),
        ("sink_blocks", whole(0), "N", "first key blocks, always kept"),
        ("window_blocks", whole(0), "N", "nearest key blocks, always kept"),
        ("last_full_blocks", whole(0), "N", "last query blocks, which keep all"),
    ):
        default = _by_device({kind: DEFAULTS[kind][name] for kind in DEFAULTS})
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=parse, metavar=metavar, help=f"{meaning} (default: {default})")
    repeats = f"repeats of each at each length; slow ones get fewer, {MIN_REPEATS} at least"
    add_options(
        parser,
        ("--repeats", whole(1), "N", "20", repeats),
        ("--output", Path, "DIR", "./flexprefill-bench", "folder for bench.json and bench.png, made if missing"),
    )


def execute(arguments: argparse.Namespace) -> int:
    arguments.output.mkdir(parents=True, exist_ok=True)
    bench.run(_bench_settings(arguments), arguments.output, arguments.command)
    return 0


def _bench_settings(arguments: argparse.Namespace) -> Settings:
    """The settings from the arguments and the device's defaults. Ends with code 2 if they do not fit together."""
    kind, refuse = arguments.device.type, arguments.parser.error
    chosen = {
        name: default if (given := getattr(arguments, name)) is None else given
        for name, default in DEFAULTS[kind].items()
    }
    if chosen["heads"] % chosen["kv_heads"]:
        refuse(f"argument --heads: must be a multiple of the {chosen['kv_heads']} key heads, got {chosen['heads']}")
    known = CONTESTANTS[kind]
    only = arguments.only or list(known)
    if unknown := [name for name in only if name not in known]:
        refuse(f"argument --only: must be of {', '.join(known)} on {kind}, got {', '.join(map(repr, unknown))}")
    lengths = arguments.lengths or list(DENSITIES[kind])
    if len(set(lengths)) < len(lengths):
        refuse(f"argument --lengths: must name each length once, got {_shown(lengths)}")
    densities = arguments.densities or [default_density(kind, length) for length in lengths]
    if len(densities) != len(lengths):
        refuse(f"argument --densities: must be one for each of {len(lengths)} lengths, got {len(densities)}")
    rule = PrefillConfig(**{name: chosen.pop(name) for name in ("sink_blocks", "window_blocks", "last_full_blocks")})
    return Settings(
        lengths=lengths,
        densities=densities,
        rule=rule,
        repeats=arguments.repeats,
        device=arguments.device,
        only=[name for name in known if name in only],
        **chosen,
    )


def _by_device(defaults: dict[str, Any]) -> str:
    return "; ".join(f"{_shown(default)} on {kind}" for kind, default in defaults.items())


def _shown(value: Any) -> str:
    """A value as one writes it on the command line."""
    if isinstance(value, list):
        return ",".join(map(_shown, value))
    return str(value).removeprefix("torch.")


def _head_dim(text: str) -> int:
    number = parse_integer(text)
    if number not in HEAD_DIMS:
        raise argparse.ArgumentTypeError(f"must be a multiple of 8 from 16 to 256, got {number}")
    return number


def _dtype(text: str) -> torch.dtype:
    for dtype in DTYPES:
        if text == _shown(dtype):
            return dtype
    raise argparse.ArgumentTypeError(f"must be {', '.join(map(_shown, DTYPES))}, got {text!r}")
