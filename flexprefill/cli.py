"""The command line: parses the arguments and calls the library."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from flexprefill import bench, demo
from flexprefill._version import __version__
from flexprefill.bench.contestants import CONTESTANTS
from flexprefill.bench.measure import LONGEST_GRAPH
from flexprefill.bench.settings import DEFAULTS, DENSITIES, Settings, default_density
from flexprefill.bench.timing import GRAPH_CALLS, MIN_REPEATS
from flexprefill.checks import DTYPES, HEAD_DIMS
from flexprefill.config import PrefillConfig
from flexprefill.errors import FlexPrefillError

DEMO = (
    "Builds four attention heads (local, sink, induction, topic) from the source of Python's standard library, "
    "without trained weights, and finds the blocks that matter to each. Prints for each head how many blocks are "
    "kept, how much of the exact attention they hold and the error of the output, then the times of dense and of "
    "sparse attention; saves the masks and, with matplotlib, draws them. Takes a minute or two on two CPU cores."
)
BENCH = (
    "Times the parts of prefill_attention, the whole, and every dense attention that is there, in turns on the same "
    "inputs: random ones with some structure, searched at the alpha that gives the asked density. Prints medians and "
    "spreads, and which part of the theoretical floor (matrix work, exponentials and bytes at the highest clocks that "
    "the driver names) is reached; writes every repeat to bench.json and, with matplotlib, draws bench.png. On CUDA, "
    f"up to {LONGEST_GRAPH:,} tokens, {GRAPH_CALLS} calls at a time are timed in a CUDA graph; longer "
    "ones by events around one call. What cannot run is listed with the reason. Lists are separated by commas. On "
    "the CPU, the default sinks and window are one block each and no last blocks keep all: the rule's own would keep "
    "more than the default density at any default length."
)
INTERRUPTED = 130  # as shells report it
MIN_LENGTH = 1024
MIN_BENCH_LENGTH = 128  # a block
DEFAULT_LENGTH = {"cpu": 16_384, "cuda": 131_072}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``flexprefill`` with these arguments (the process's own if None).

    Returns:
        the exit code: 0, or 130 if it was interrupted from the keyboard.

    Raises:
        SystemExit: with code 0 after ``--help`` and ``--version``, with code 2 after an argument that does not
            fit, and whatever else the library refuses.
    """
    parser = argparse.ArgumentParser(prog="flexprefill", description="Block-sparse prefill attention for PyTorch.")
    parser.add_argument("--version", action="version", version=f"flexprefill {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, add_arguments, execute, summary, description in (
        ("demo", _add_demo_arguments, _run_demo, "find, time and draw the blocks that matter in real text", DEMO),
        ("bench", _add_bench_arguments, _run_bench, "time every part, and dense attention beside it", BENCH),
    ):
        command = commands.add_parser(name, help=summary, description=description)
        add_arguments(command)
        command.set_defaults(parser=command, execute=execute)
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = parser.parse_args(argv)
    arguments.command = shlex.join(["flexprefill", *argv])

    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        arguments.execute(arguments)
    except (FlexPrefillError, OSError) as error:
        arguments.parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _run_demo(arguments: argparse.Namespace) -> None:
    length = arguments.length or DEFAULT_LENGTH[arguments.device.type]
    demo.run(length, arguments.config, arguments.device, arguments.output, arguments.seed)


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


def _add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=_device, default=device, help=f"cpu, cuda or cuda:N (default: {device} here)")
    lengths = {kind: list(known) for kind, known in DENSITIES.items()}
    densities = {kind: list(known.values()) for kind, known in DENSITIES.items()}
    names = "; ".join(f"on {kind}: {', '.join(known)}" for kind, known in CONTESTANTS.items())
    parser.add_argument("--only", type=_list_of(str), metavar="NAMES", help=f"what to time (default: all {names})")
    parser.add_argument(
        "--lengths",
        type=_list_of(_whole(MIN_BENCH_LENGTH)),
        metavar="TOKENS",
        help=f"at least {MIN_BENCH_LENGTH} each (default: {_by_device(lengths)})",
    )
    parser.add_argument(
        "--densities",
        type=_list_of(_share),
        metavar="SHARES",
        help="to keep of the causal blocks, one for each length, reached as nearly as sinks, window, last blocks and "
        f"each row's best block allow (default: {_by_device(densities)} "
        "for the default lengths, and for others in between)",
    )
    for name, parse, metavar, meaning in (
        ("heads", _whole(1), "N", "query heads, a multiple of the key heads"),
        ("kv_heads", _whole(1), "N", "key heads"),
        ("head_dim", _head_dim, "D", "a multiple of 8 from 16 to 256"),
        ("dtype", _dtype, "DTYPE", ", ".join(map(_shown, DTYPES))),
        ("sink_blocks", _whole(0), "N", "first key blocks, always kept"),
        ("window_blocks", _whole(0), "N", "nearest key blocks, always kept"),
        ("last_full_blocks", _whole(0), "N", "last query blocks, which keep all"),
    ):
        default = _by_device({kind: DEFAULTS[kind][name] for kind in DEFAULTS})
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=parse, metavar=metavar, help=f"{meaning} (default: {default})")
    parser.add_argument(
        "--repeats",
        type=_whole(1),
        metavar="N",
        default="20",
        help=f"of each at each length; fewer, but not under {MIN_REPEATS}, where they take long (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        default="./flexprefill-bench",
        help="folder for bench.json and bench.png, made if missing (default: %(default)s)",
    )


def _run_bench(arguments: argparse.Namespace) -> None:
    bench.run(_bench_settings(arguments), arguments.output, arguments.command)


def _bench_settings(arguments: argparse.Namespace) -> Settings:
    """The settings that the arguments and the device's defaults give; ends with code 2 if they do not fit together."""
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
    """A value as it is given on the command line."""
    if isinstance(value, list):
        return ",".join(map(_shown, value))
    return str(value).removeprefix("torch.")


def _list_of(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [parse(part.strip()) for part in text.split(",")]


def _whole(minimum: int) -> Callable[[str], int]:
    """A parser of whole numbers from ``minimum`` to below 2**31."""

    def parse(text: str) -> int:
        number = _integer(text)
        if not minimum <= number < 2**31:
            raise argparse.ArgumentTypeError(f"must be at least {minimum} and below 2**31, got {number}")
        return number

    return parse


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:  # false for NaN as well
        raise argparse.ArgumentTypeError(f"must be a number above 0 and at most 1, got {text!r}")
    return share


def _head_dim(text: str) -> int:
    number = _integer(text)
    if number not in HEAD_DIMS:
        raise argparse.ArgumentTypeError(f"must be a multiple of 8 from 16 to 256, got {number}")
    return number


def _dtype(text: str) -> torch.dtype:
    for dtype in DTYPES:
        if text == _shown(dtype):
            return dtype
    raise argparse.ArgumentTypeError(f"must be {', '.join(map(_shown, DTYPES))}, got {text!r}")


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
    return PrefillConfig(alpha=_share(alpha))


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
