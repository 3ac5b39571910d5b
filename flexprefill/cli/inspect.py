"""flexprefill inspect."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from flexprefill.blockmap.geometry import Geometry, visible_blocks
from flexprefill.blockmap.map import BlockMap
from flexprefill.cli.masks import (
    add_choice_arguments,
    as_panels,
    check_choice,
    describe_geometry,
    geometry,
    read_layer,
    row_name,
)
from flexprefill.cli.table import print_table, printable
from flexprefill.config import PrefillConfig
from flexprefill.inspection import PATTERNS, HeadSummary, compare_maps, head_similarity, summarize_heads
from flexprefill.plotting import plot_heads, plot_layers, token_label
from flexprefill.runtime.progress import terminal_stage
from flexprefill.store import MaskFileInfo, read_mask_info

NAME = "inspect"
SUMMARY = "what a mask file holds, by layer and head"
DESCRIPTION = (
    "Prints what a mask file holds: one line a layer, or with --layer or --head one line a head: the density (kept "
    "share of the causal blocks), the kept blocks by pattern, and how alike heads and neighbouring layers are "
    "(IoU, intersection over union of their blocks). --png draws the density by layer and head, or with --layer or "
    "--head the maps themselves. Exit code 0, or 2 if the file cannot be read or has no such layer or head."
)
PROFILE_LINES = 16
BAR_WIDTH = 40


@dataclass(frozen=True, eq=False)
class Layer:
    """What the command tells of one layer.

    Attributes:
        heads: a summary of each chosen head, under its own number.
        similarity: IoU of each chosen head with each other, float64 [B, H, H].
        before: number of the layer above it in the file, and IoU of the heads of equal number, float64 [B, H];
            None for the first, and where shapes differ.
    """

    number: int
    heads: list[HeadSummary]
    similarity: Tensor
    before: tuple[int, Tensor] | None

    def nearest(self, index: int) -> tuple[int, float] | None:
        """Which other head is most like the one at this place in ``heads``, and their IoU; None if it is alone."""
        batch, own = divmod(index, self.similarity.shape[1])
        others = self.similarity[batch, own].clone()
        others[own] = -1
        best = int(others.argmax())
        return None if best == own else (best, float(others[best]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a file that save_masks wrote")
    add_choice_arguments(parser)


def execute(arguments: argparse.Namespace) -> int:
    path, layer, head = arguments.file, arguments.layer, arguments.head
    info = read_mask_info(path)
    check_choice(path, info, layer, head)
    numbers = list(info.layers) if layer is None else [layer]
    overview = layer is None and head is None
    if arguments.png:
        _draw(path, info, numbers, head, arguments.png, overview=overview)
        print(f"picture  {arguments.png}")
        return 0
    layers = _read_layers(path, info, numbers, head)
    if arguments.json:
        print(json.dumps(_record(path, info, layers)))
        return 0
    print(_heading(path, info, numbers))
    print()
    if overview:
        _print_layers(info, layers)
    else:
        _print_heads(info, layers, head)
    if layer is not None and head is not None:
        for summary in layers[0].heads:
            print()
            _print_profile(info, layer, summary)
    print()
    print(_legend(info.config, layers, overview))
    return 0


def _read_layers(path: Path, info: MaskFileInfo, numbers: Sequence[int], head: int | None) -> list[Layer]:
    """The chosen layers, of which two are held at a time."""
    layers: list[Layer] = []
    before: tuple[int, BlockMap] | None = None
    with terminal_stage("inspecting layers", len(numbers)) as advance:
        for number in numbers:
            block_map = read_layer(path, number, head)
            summaries = summarize_heads(block_map, config=info.config)
            if head is not None:
                summaries = [dataclasses.replace(summary, head=head) for summary in summaries]
            like_before = None
            if before is not None and info.layers[before[0]] == info.layers[number]:
                like_before = (before[0], compare_maps(before[1], block_map).iou)
            layers.append(Layer(number, summaries, head_similarity(block_map), like_before))
            before = (number, block_map)
            advance(1)
    return layers


def _record(path: Path, info: MaskFileInfo, layers: Sequence[Layer]) -> dict[str, Any]:
    """Everything, ready for JSON."""
    record: dict[str, Any] = {
        "file": str(path),
        "format_version": info.format_version,
        "config": info.config and info.config.to_dict(),
        "config_hash": info.config_hash,
        "model": info.model,
        "token_ids_hash": info.token_ids_hash,
        "dtype": info.dtype,
        "scoring": info.scoring,
        "library": info.library,
        "metadata": info.metadata,
    }
    record["layers"] = [
        {
            "layer": layer.number,
            **info.layers[layer.number],
            "density": fmean(summary.density for summary in layer.heads),
            "similarity": layer.similarity.tolist(),
            "layer_before": layer.before and {"layer": layer.before[0], "iou": layer.before[1].tolist()},
            "heads": [summary.to_dict() for summary in layer.heads],
        }
        for layer in layers
    ]
    return record


def _heading(path: Path, info: MaskFileInfo, numbers: Sequence[int]) -> str:
    lines = [f"{path}: format {info.format_version}, {len(info.layers)} layer{'s' if len(info.layers) > 1 else ''}"]
    about: dict[str, list[str]] = {}
    for number in numbers:
        about.setdefault(describe_geometry(info.layers[number]), []).append(str(number))
    for text, layers in about.items():
        lines.append(text if len(about) == 1 else f"layer {', '.join(layers)}: {text}")
    if info.config is not None:
        alpha = info.config.alpha
        text = f"{min(alpha):g} to {max(alpha):g} by head" if isinstance(alpha, tuple) else f"{alpha:g}"
        settings = info.config.to_dict() | {"alpha": text}
        lines.append(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items()))
    told = {"model": info.model, "dtype": info.dtype, "token ids": info.token_ids_hash, "scoring": info.scoring}
    told |= {"written by": ", ".join(f"{name} {version}" for name, version in info.library.items())}
    lines += [f"{name}: {entry}" for name, entry in told.items() if entry]
    lines += [f"{name}: {entry}" for name, entry in info.metadata.items()]
    return "\n".join(map(printable, lines))  # a file's own words are anybody's


def _print_layers(info: MaskFileInfo, layers: Sequence[Layer]) -> None:
    header = ["layer", "density", "min–max", *PATTERNS, "heads' IoU", "IoU above"]
    rows = []
    for layer in layers:
        densities = [summary.density for summary in layer.heads]
        kept = max(1, sum(summary.kept for summary in layer.heads))
        heads = layer.similarity.shape[1]
        off_diagonal = layer.similarity[:, ~torch.eye(heads, dtype=torch.bool)]
        rows.append(
            [
                str(layer.number),
                _percent(fmean(densities)),
                f"{100 * min(densities):.1f}–{100 * max(densities):.1f}",
                *(f"{100 * sum(summary.patterns[name] for summary in layer.heads) / kept:.1f}" for name in PATTERNS),
                f"{off_diagonal.mean():.2f}" if heads > 1 else "",
                f"{layer.before[1].mean():.2f}" if layer.before else "",
            ]
        )
    print_table(header, rows)


def _print_heads(info: MaskFileInfo, layers: Sequence[Layer], head: int | None) -> None:
    header = [
        "head" if len(layers) == 1 else f"head {head}",
        "density",
        "blocks a row",
        *PATTERNS,
        "nearest",
        "IoU above",
    ]
    rows = []
    for layer in layers:
        for index, summary in enumerate(layer.heads):
            nearest = layer.nearest(index)
            counts = summary.counts
            rows.append(
                [
                    row_name(info, layer.number, summary.batch, summary.head, one_layer=len(layers) == 1),
                    _percent(summary.density),
                    f"{int(counts.min())}/{int(counts.median())}/{int(counts.max())}",
                    *(f"{100 * share:.1f}" for share in summary.shares.values()),
                    f"{nearest[0]} ({nearest[1]:.2f})" if nearest else "",
                    f"{layer.before[1].flatten()[index]:.2f}" if layer.before else "",
                ]
            )
    print_table(header, rows)


def _print_profile(info: MaskFileInfo, layer: int, summary: HeadSummary) -> None:
    """How many blocks query blocks keep along the prompt, each line an equal number of them."""
    sizes = info.layers[layer]
    q_len, kv_len, block_size = geometry(sizes)
    visible = visible_blocks(Geometry(q_len, kv_len, block_size), "cpu")
    rows = summary.counts.shape[0]
    step = -(-rows // PROFILE_LINES)
    means = [float(part.float().mean()) for part in summary.counts.split(step)]
    seen = [int(part.sum()) for part in visible.split(step)]
    kept = [int(part.sum()) for part in summary.counts.split(step)]
    lines = []
    for index, mean in enumerate(means):
        first, last = index * step * block_size, min((index + 1) * step * block_size, q_len)
        lines.append(
            [
                f"{token_label(first + kv_len - q_len)} – {token_label(last + kv_len - q_len)}",
                f"{mean:.1f}",
                _percent(kept[index] / seen[index]),
                ("#" * round(BAR_WIDTH * mean / max(1.0, *means))).ljust(BAR_WIDTH),
            ]
        )
    print_table(["query tokens", "blocks a row", "density", ""], lines)


def _legend(config: PrefillConfig | None, layers: Sequence[Layer], overview: bool) -> str:
    """What the columns are; only what the table has."""
    rule = "by the file's settings" if config else "by the default settings: the file has none"
    blocks_a_row = "" if overview else "blocks a row: key blocks that a query block keeps, least/median/most\n"
    lines = [f"{blocks_a_row}sink … scattered: % of the kept blocks ({rule})"]
    if len(layers) > 1:
        lines.append("IoU above: same heads, with the layer of the line above, where shapes agree")
    return "\n".join(lines)


def _draw(
    path: Path, info: MaskFileInfo, numbers: Sequence[int], head: int | None, picture: Path, *, overview: bool
) -> None:
    if overview and len(numbers) > 1:
        densities = {}
        with terminal_stage("reading layers", len(numbers)) as advance:
            for number in numbers:
                densities[number] = read_layer(path, number, head).density().flatten()
                advance(1)
        plot_layers(densities, picture, label="kept share of the causal blocks")
        return
    block_map, titles = as_panels(path, info, numbers, head)
    plot_heads(block_map, picture, titles=titles)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
