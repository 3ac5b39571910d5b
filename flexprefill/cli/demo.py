"""flexprefill demo: attention heads of a real model, and what the search does to each."""

from __future__ import annotations

import argparse
import math
import platform
import shlex
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
from flexprefill.evaluation.built_heads import HEADS, build_prompt, read_tokens
from flexprefill.evaluation.real_heads import MODEL, REAL_HEADS, REAL_LENGTH, TEXT, load_heads
from flexprefill.inspection import Recall, attention_recall
from flexprefill.plotting import plot_heads
from flexprefill.plotting.canvas import new_figure
from flexprefill.runtime.progress import Advance, stage
from flexprefill.search import reference
from flexprefill.search.blocks import search_blocks
from flexprefill.search.rule import Rule
from flexprefill.store.writing import save_masks

DESCRIPTION = (
    f"Shows what the search does to {len(REAL_HEADS)} attention heads of {MODEL}. Their queries, keys and values on a "
    "real text come with the package. Prints for each head how many blocks are kept, how much of the exact attention "
    "they hold, and the error of the output; then the times of dense and of sparse attention. Saves the masks and, "
    f"with matplotlib, draws them. A --length above {REAL_LENGTH:,} takes four heads that are built from the source of "
    "Python's standard library, without trained weights; a GPU shows these as well. Takes about half a minute on two "
    "CPU cores, most of it to compile."
)
MIN_LENGTH = 1024
BUILT_LENGTH = 131_072  # tokens of the heads that a GPU shows as well
MUCH = 0.9  # a head whose rows keep less of their attention is named
FEW = 0.5  # and one of which a row in twenty keeps less
OFF = 0.2  # and one whose output is off by more
REPEATS = 9
PANEL, HEADLINE = 680, 200  # pixels of the picture: a head's, and the height of the words above

# names of the timed calls
DENSE_FLEX, DENSE_SDPA, SPARSE = "dense FlexAttention", "dense SDPA", "sparse, search included"
SEARCH, LISTS = "  its search alone", "  its index lists alone"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--length",
        type=_length,
        metavar="TOKENS",
        help=f"tokens of text, at least {MIN_LENGTH} (default: {REAL_LENGTH}, and on cuda also {BUILT_LENGTH})",
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
    parser.add_argument("--seed", type=_seed, default="0", help="of the heads that are built (default: %(default)s)")


def execute(arguments: argparse.Namespace) -> int:
    arguments.output.mkdir(parents=True, exist_ok=True)
    device, start = arguments.device, time.perf_counter()
    lengths = [arguments.length or REAL_LENGTH]
    if arguments.length is None and device.type == "cuda":
        lengths.append(BUILT_LENGTH)
    files = []
    for length in lengths:
        with stage("reading heads" if length <= REAL_LENGTH else "building heads", 1) as advance:
            prompt = (
                real_prompt(length, device) if length <= REAL_LENGTH else built_prompt(length, device, arguments.seed)
            )
            advance(1)
        files.append(show(prompt, arguments.config, arguments.output / f"masks{prompt.suffix}.safetensors"))
    print(f"{time.perf_counter() - start:.0f} s in all\n")
    for file in files:
        print(f"to look at the masks: flexprefill view {shlex.quote(str(file))}")
    return 0


@dataclass(frozen=True)
class Prompt:
    """Heads that are shown together.

    Attributes:
        query: [1, Hq, S, D]; key, value: [1, Hkv, S, D].
        heads: what each query head attends to, by its name.
        text, origin: what was read, and where the heads come from, in words.
        suffix: of the names of files.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    heads: dict[str, str]
    text: str
    origin: str
    suffix: str = ""


@dataclass(frozen=True)
class HeadFigures:
    """What the search does to one head.

    Attributes:
        density: kept share of the causal blocks.
        recall: share of the exact attention mass in the kept blocks, the mean over rows that can lose some.
        low: the share that one of these rows in twenty does not reach.
        error: norm of (sparse output - dense output) over the norm of the dense output.
    """

    name: str
    density: float
    recall: float
    low: float
    error: float


def real_prompt(length: int, device: torch.device) -> Prompt:
    """The model's heads over the first tokens of their text."""
    text, origin = f"{length:,} tokens of {TEXT}", f"of {MODEL}, named layer.head; two each share a key head"
    return Prompt(*load_heads(length, device), REAL_HEADS, text, origin)


def built_prompt(length: int, device: torch.device, seed: int) -> Prompt:
    """The four built heads over so many tokens of the standard library's source."""
    built = build_prompt(read_tokens(length), device, seed)
    words = int(built.tokens.max()) + 1
    text = f"{length:,} tokens, {words:,} different ones, of the source of Python {platform.python_version()}"
    origin = f"built from the text without trained weights, seed {seed}"
    return Prompt(built.query, built.key, built.value, HEADS, text, origin, "-built")


def show(prompt: Prompt, config: PrefillConfig, masks: Path) -> Path:
    """Searches, measures, prints what came out, saves the masks and, with matplotlib, their picture beside them.

    The figures go to stdout and the progress to stderr.

    Args:
        config: the rule's settings.
        masks: the file to write, in an existing folder.

    Returns:
        the file.

    Raises:
        FlexPrefillError: attention cannot be compiled here.
        OSError: a file cannot be written.
    """
    query, key, device = prompt.query, prompt.key, prompt.query.device
    print(describe_prompt(prompt, config), end="\n\n")
    block_map = search_blocks(query, key, config)
    everything = BlockMap.causal(
        1, len(prompt.heads), q_len=query.shape[2], kv_len=key.shape[2], block_size=config.block_size, device=device
    )
    with stage("compiling, first runs", 2) as advance:
        dense, compile_seconds = timed(lambda: attend(prompt, everything), device)
        advance(1)
        error = relative_error(attend(prompt, block_map), dense)
        advance(1)
    with stage("exact attention mass", len(prompt.heads)) as advance:
        recall = attention_recall(query, key, block_map, progress=advance)
    figures = head_figures(prompt, block_map, recall, error)
    print(head_table(figures, prompt.heads))
    print("\n".join(losses(figures)), end="\n\n")

    calls: dict[str, Callable[[], Any]] = {
        DENSE_FLEX: lambda: attend(prompt, everything),
        DENSE_SDPA: lambda: scaled_dot_product_attention(query, key, prompt.value, is_causal=True, enable_gqa=True),
        SPARSE: lambda: prefill_attention(query, key, prompt.value, config),
        SEARCH: lambda: search_blocks(query, key, config),
        LISTS: block_map.to_block_mask,
    }
    with stage("timing", (1 + REPEATS) * len(calls)) as advance:
        seconds = time_calls(calls, device, advance)
    print(time_table(seconds, compile_seconds), end="\n\n")
    print(save(prompt, block_map, config, masks))
    return masks


def always_kept_share(geometry: Geometry, config: PrefillConfig) -> float:
    """The share of causal blocks that sinks, window and last blocks keep whatever the scores are."""
    rule = Rule.of(config, scale=1.0, last_chunk=True)
    kept = reference.always_kept(geometry, rule, "cpu")
    return BlockMap.from_dense(kept[None, None], **geometry._asdict()).density().item()


def attend(prompt: Prompt, block_map: BlockMap) -> Tensor:
    """Compiled attention of the prompt over the blocks of a map: [1, Hq, S, D]."""
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
    query, device = prompt.query, prompt.query.device
    _, heads, length, dim = query.shape
    cpu = f"CPU with {torch.get_num_threads()} threads"
    always = always_kept_share(Geometry(length, length, config.block_size), config)
    return (
        f"flexprefill {__version__}, torch {torch.__version__}, "
        f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu}\n"
        f"text   {prompt.text}\n"
        f"heads  {heads}, {prompt.origin}; head dimension {dim}, {str(query.dtype).removeprefix('torch.')}\n"
        f"rule   alpha {config.alpha:g}, blocks of {config.block_size}; the sink, window and last blocks, "
        f"always kept, are {100 * always:.1f} % of the causal ones"
    )


def head_figures(prompt: Prompt, block_map: BlockMap, recall: Recall, error: Tensor) -> list[HeadFigures]:
    """The figures of each head."""
    columns = (block_map.density()[0], recall.mean[0], recall.quantile(0.05)[0], error)
    return [HeadFigures(*row) for row in zip(prompt.heads, *(column.tolist() for column in columns), strict=True)]


def head_table(figures: Sequence[HeadFigures], heads: dict[str, str]) -> str:
    """The figures by head, aligned."""
    lines = ["head          kept  recall  5 % of rows below  output error  attends to"]
    for row in figures:
        shares = f"{100 * row.density:4.1f} %  {row.recall:6.3f}  {row.low:17.3f}  {row.error:12.4f}"
        lines.append(f"{row.name:<11} {shares}  {heads[row.name]}")
    return "\n".join(lines)


def losses(figures: Sequence[HeadFigures]) -> list[str]:
    """What the recall means, and a sentence on each head that loses much."""
    lines = ["recall: the share of the exact attention that the kept blocks hold, over rows that can lose some"]
    for row in figures:
        off = f"Its output is off by {100 * row.error:.0f} %."
        if row.recall < MUCH:
            lines.append(f"{row.name} loses much: its rows keep {100 * row.recall:.0f} % on average. {off}")
        elif row.low < FEW:
            lines.append(
                f"{row.name} loses much in a few rows: one in twenty keeps less than {100 * row.low:.0f} %. {off}"
            )
        elif row.error > OFF:
            lines.append(f"{row.name} loses little, but what it loses matters. {off}")
    if len(lines) > 1:
        lines.append(
            "Such heads need more blocks than this setting keeps: a smaller --alpha keeps more. The library's default "
            "search finds single keys."
        )
    return lines


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


def save(prompt: Prompt, block_map: BlockMap, config: PrefillConfig, masks: Path) -> str:
    """Writes the masks and, with matplotlib, their picture, and returns where they are."""
    picture = masks.with_suffix(".png")
    metadata = {"made_by": "flexprefill demo", "heads": ", ".join(prompt.heads), "origin": prompt.origin}
    save_masks(masks, {0: block_map}, config=config, metadata=metadata, dtype=prompt.query.dtype)
    try:
        draw(prompt, block_map, picture)
        drawn = str(picture)
    except FlexPrefillError as error:
        drawn = f"skipped: {error}"
    return (
        f"masks    {masks}\n"
        f'         to load: from flexprefill import load_masks; load_masks("{masks}")[0]\n'
        f"picture  {drawn}"
    )


def draw(prompt: Prompt, block_map: BlockMap, picture: Path) -> None:
    """A picture of the heads' masks, with sentences above that explain it."""
    columns = math.ceil(math.sqrt(len(prompt.heads)))
    rows = math.ceil(len(prompt.heads) / columns)
    size = block_map.block_size
    explained = (
        f"Attention heads {prompt.origin.partition(';')[0]}, over {block_map.q_len:,} tokens.\n"
        f"A square stands for {size} tokens that look (down) at {size} tokens (to the right).\n"
        "Dark squares are computed, light ones are skipped."
    )
    figure = new_figure(PANEL * columns, PANEL * rows + HEADLINE, picture)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)
    figure.suptitle(explained, fontsize=11, linespacing=1.6)
    plot_heads(block_map, picture, ax=figure.subplots(rows, columns), titles=list(prompt.heads))


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
