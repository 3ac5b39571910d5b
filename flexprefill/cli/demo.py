"""flexprefill demo: real text, four attention heads built from it, and what the search does to each."""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flexprefill._version import __version__
from flexprefill.attention.prefill import prefill_attention
from flexprefill.blockmap.geometry import Geometry
from flexprefill.blockmap.map import BlockMap
from flexprefill.cli.values import parse_device, parse_integer, parse_share
from flexprefill.config import PrefillConfig
from flexprefill.errors import FlexPrefillError
from flexprefill.evaluation.built_heads import BUILT_HEAD_DIM, HEADS, Prompt, build_prompt, read_tokens
from flexprefill.inspection import attention_recall
from flexprefill.plotting import plot_heads
from flexprefill.runtime.progress import Advance, stage
from flexprefill.search import reference
from flexprefill.search.blocks import search_blocks
from flexprefill.search.rule import Rule
from flexprefill.store.writing import save_masks

DESCRIPTION = (
    "Builds four attention heads (local, sink, induction, topic) from the source of Python's standard library, "
    "without trained weights, and finds the blocks that matter to each. Prints for each head how many blocks are "
    "kept, how much of the exact attention they hold and the error of the output, then the times of dense and of "
    "sparse attention; saves the masks and, with matplotlib, draws them. Takes a minute or two on two CPU cores."
)
MIN_LENGTH = 1024
DEFAULT_LENGTH = {"cpu": 16_384, "cuda": 131_072}
REPEATS = 9

# names of the timed calls
DENSE_FLEX, DENSE_SDPA, SPARSE = "dense FlexAttention", "dense SDPA", "sparse, search included"
SEARCH, LISTS = "  its search alone", "  its index lists alone"


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
    run_demo(length, arguments.config, arguments.device, arguments.output, arguments.seed)
    return 0


@dataclass(frozen=True)
class HeadFigures:
    """What the search does to one head.

    Attributes:
        density: kept share of the causal blocks.
        mass: share of the exact attention mass in the kept blocks, averaged over the rows.
        error: norm of (sparse output - dense output) over the norm of the dense output.
    """

    name: str
    density: float
    mass: float
    error: float


def run_demo(length: int, config: PrefillConfig, device: torch.device, output: Path, seed: int) -> None:
    """Builds the heads, searches, measures, and prints and saves what came out.

    Prints the figures to stdout and the progress to stderr; writes masks.safetensors and, with matplotlib,
    masks.png.

    Args:
        length: tokens of text.
        config: the rule's settings.
        device: "cpu" (float32) or a CUDA device (bfloat16).
        output: an existing folder.
        seed: of the token embeddings.

    Raises:
        FlexPrefillError: the text is shorter than ``length``, or attention cannot be compiled here.
        OSError: a file cannot be written.
    """
    start = time.perf_counter()
    with stage("building heads, searching", 2) as advance:
        prompt = build_prompt(read_tokens(length), device, seed)
        advance(1)
        block_map = search_blocks(prompt.query, prompt.key, config)
        everything = BlockMap.causal(
            1, len(HEADS), q_len=length, kv_len=length, block_size=config.block_size, device=device
        )
        advance(1)
    print(describe_prompt(prompt, config), end="\n\n")

    with stage("compiling, first runs", 2) as advance:
        dense, compile_seconds = timed(lambda: attend(prompt, everything), device)
        advance(1)
        error = relative_error(attend(prompt, block_map), dense)
        advance(1)
    with stage("exact attention mass", len(HEADS)) as advance:
        mass = attention_recall(prompt.query, prompt.key, block_map, progress=advance).mean[0].tolist()
    densities, errors = block_map.density()[0].tolist(), error.tolist()
    figures = [HeadFigures(name, densities[head], mass[head], errors[head]) for head, name in enumerate(HEADS)]
    print(head_table(figures), end="\n\n")

    calls: dict[str, Callable[[], Any]] = {
        DENSE_FLEX: lambda: attend(prompt, everything),
        DENSE_SDPA: lambda: scaled_dot_product_attention(prompt.query, prompt.key, prompt.value, is_causal=True),
        SPARSE: lambda: prefill_attention(prompt.query, prompt.key, prompt.value, config),
        SEARCH: lambda: search_blocks(prompt.query, prompt.key, config),
        LISTS: block_map.to_block_mask,
    }
    with stage("timing", (1 + REPEATS) * len(calls)) as advance:
        seconds = time_calls(calls, device, advance)
    print(time_table(seconds, compile_seconds), end="\n\n")

    print(save(block_map, config, output, seed))
    print(f"{time.perf_counter() - start:.0f} s in all")


def always_kept_share(length: int, config: PrefillConfig) -> float:
    """The share of causal blocks that sinks, window and last blocks keep whatever the scores are."""
    rule = Rule.of(config, scale=BUILT_HEAD_DIM**-0.5, last_chunk=True)
    geometry = Geometry(length, length, config.block_size)
    kept = reference.always_kept(geometry, rule, "cpu")
    return BlockMap.from_dense(kept[None, None], **geometry._asdict()).density().item()


def attend(prompt: Prompt, block_map: BlockMap) -> Tensor:
    """Compiled attention of the prompt over the blocks of a map: [1, 4, S, 64]."""
    return prefill_attention(prompt.query, prompt.key, prompt.value, block_map=block_map)


def relative_error(output: Tensor, exact: Tensor) -> Tensor:
    """Norm of the difference over the norm of ``exact``, both [1, H, S, D], by head: float32 [H]."""
    difference = (output.float() - exact.float()).flatten(2)  # [1, H, S · D]
    return (difference.norm(dim=2) / exact.float().flatten(2).norm(dim=2))[0].cpu()


def timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What a call returns, and the seconds until the device has done it."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    wait(device)
    start = time.perf_counter()
    result = call()
    wait(device)
    return result, time.perf_counter() - start


def time_calls(calls: dict[str, Callable[[], Any]], device: torch.device, advance: Advance) -> dict[str, list[float]]:
    """Seconds of REPEATS runs of each call, taken in turns after one run that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(1 + REPEATS):
        for name, call in calls.items():
            seconds[name].append(timed(call, device)[1])
            advance(1)
    return {name: runs[1:] for name, runs in seconds.items()}


def describe_prompt(prompt: Prompt, config: PrefillConfig) -> str:
    """What is measured, on what."""
    device, words = prompt.query.device, int(prompt.tokens.max()) + 1
    cpu = f"CPU with {torch.get_num_threads()} threads"
    return (
        f"flexprefill {__version__}, torch {torch.__version__}, "
        f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu}\n"
        f"text   {prompt.tokens.shape[0]:,} tokens, {words:,} different ones, of the source of Python "
        f"{platform.python_version()}'s standard library\n"
        f"heads  {len(HEADS)}, built from the text without trained weights; head dimension {BUILT_HEAD_DIM}, "
        f"{str(prompt.query.dtype).removeprefix('torch.')}\n"
        f"rule   alpha {config.alpha:g}, blocks of {config.block_size}; the sink, window and last blocks, "
        f"always kept, are {100 * always_kept_share(prompt.tokens.shape[0], config):.1f} % of the causal ones"
    )


def head_table(figures: Sequence[HeadFigures]) -> str:
    """The figures by head, aligned."""
    lines = ["head       density  exact mass kept  output error  attends to"]
    lines += [
        f"{row.name:<9}  {100 * row.density:5.1f} %  {100 * row.mass:13.2f} %  {row.error:12.4f}  {HEADS[row.name]}"
        for row in figures
    ]
    return "\n".join(lines)


def time_table(seconds: dict[str, list[float]], compile_seconds: float) -> str:
    """The times of all calls, aligned, and how sparse compares with dense."""
    lines = [f"{f'{REPEATS} runs each, in turns':<25}  median ms    fastest – slowest"]
    for name, runs in seconds.items():
        low, middle, high = (f"{1000 * t:,.1f}" for t in (min(runs), statistics.median(runs), max(runs)))
        lines.append(f"{name:<25}  {middle:>9}  {low:>9} – {high}")
    lines.append(f"not in these: the first call, which compiles, {compile_seconds:.1f} s")
    lines += [verdict(seconds[SPARSE], seconds[name], name) for name in (DENSE_FLEX, DENSE_SDPA)]
    return "\n".join(lines)


def verdict(sparse: Sequence[float], dense: Sequence[float], name: str) -> str:
    """One line on which of two sets of runs is faster, by their medians."""
    ratio = statistics.median(dense) / statistics.median(sparse)
    compared = f"{ratio:.2f}× faster" if ratio >= 1 else f"{1 / ratio:.2f}× slower"
    overlap = min(dense) <= max(sparse) and min(sparse) <= max(dense)
    doubt = " (single runs overlap)" if overlap else ""
    return f"sparse, its search included, is {compared} than {name} here{doubt}"


def save(block_map: BlockMap, config: PrefillConfig, output: Path, seed: int) -> str:
    """Writes the masks and, with matplotlib, their picture, and returns where they are."""
    masks, picture = output / "masks.safetensors", output / "masks.png"
    metadata = {"made_by": "flexprefill demo", "heads": ", ".join(HEADS), "seed": str(seed)}
    save_masks(masks, {0: block_map}, config=config, metadata=metadata)
    try:
        plot_heads(block_map, picture, titles=list(HEADS))
        drawn = str(picture)
    except FlexPrefillError as error:
        drawn = f"skipped: {error}"
    return (
        f"masks    {masks}\n"
        f'         to open: from flexprefill import load_masks; load_masks("{masks}")[0]\n'
        f"picture  {drawn}"
    )


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
