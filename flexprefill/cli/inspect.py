"""flexprefill inspect: what a mask file holds, by layer and head."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flexprefill.blockmap.geometry import visible_blocks
from flexprefill.cli.masks import (
    add_choice_arguments,
    as_panels,
    check_choice,
    describe_geometry,
    read_info,
    read_layer,
    row_name,
)
from flexprefill.cli.quick import Record, quick_dict, quick_head_records, quick_layer_record, with_recall
from flexprefill.cli.table import print_csv, print_json, print_table, print_text, printable
from flexprefill.runtime.progress import terminal_stage
from flexprefill.store import MaskFileInfo
from flexprefill.store.contents import geometry_of
from flexprefill.store.figures import RECALL_ENTRY, read_recall

if TYPE_CHECKING:
    from flexprefill.cli.layers import LayerSummary
    from flexprefill.inspection import HeadSummary

DESCRIPTION = (
    "Prints what a mask file holds: one line a layer, or with --layer or --head one line a head: the density (kept "
    "share of the causal blocks), the kept blocks by pattern, and how alike heads and neighbouring layers are "
    "(IoU, intersection over union of their blocks). A head that keeps every causal block is called dense. A file of "
    "record_masks(recall=True) also says what share of the exact attention mass is kept. --quick reads no masks: it "
    "prints the sizes, settings, densities and recall that the file says of itself. --png draws the "
    "density by layer and head, or with --layer or --head the maps themselves. Exit code 0, or 2 if the file cannot "
    "be read or has no such layer or head."
)
PROFILE_LINES = 16
PROFILE_BAR_WIDTH = 24  # the table then fits into 60 columns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a file that save_masks wrote")
    add_choice_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="read no masks: only what the file says of itself")


def execute(arguments: argparse.Namespace) -> int:
    path, layer, head = arguments.file, arguments.layer, arguments.head
    if arguments.quick and arguments.png:
        arguments.parser.error("argument --quick: not allowed with argument --png")
    info = read_info(path)
    check_choice(path, info, layer, head)
    numbers = list(info.layers) if layer is None else [layer]
    overview = layer is None and head is None
    if arguments.png:
        _draw(path, info, numbers, head, arguments.png, overview=overview)
        print(f"picture  {arguments.png}")
        return 0
    if arguments.quick:
        _tell_quick(arguments, info, numbers, overview)
        return 0

    from flexprefill.cli.layers import head_records, layer_record, read_layers  # imports torch
    from flexprefill.inspection import PATTERNS

    layers = read_layers(path, info, numbers, head)
    if arguments.json:
        recall = read_recall(info)
        told = [
            {"layer": layer.number, **info.layers[layer.number], "recall": recall.get(layer.number), **layer.to_dict()}
            for layer in layers
        ]
        print_json(_about(path, info) | {"layers": told})
        return 0
    if overview:
        records = [layer_record(layer) for layer in layers]
    else:
        records = [record for layer in layers for record in head_records(layer)]
    records = with_recall(records, read_recall(info))
    if arguments.csv:
        print_csv(records)
        return 0
    print_text(_heading(path, info, numbers))
    print()
    if overview:
        _print_layers(records, PATTERNS)
    else:
        _print_heads(info, records, head, PATTERNS, one_layer=len(layers) == 1)
    if layer is not None and head is not None:
        for summary in layers[0].heads:
            print()
            _print_profile(info, layer, summary)
    print()
    print_text(_legend(info, layers, overview))
    return 0


def _tell_quick(arguments: argparse.Namespace, info: MaskFileInfo, numbers: Sequence[int], overview: bool) -> None:
    """What the header says, in the form that was asked for."""
    by_layer = {number: quick_head_records(info, number, arguments.head) for number in numbers}
    if arguments.json:
        recall = read_recall(info)
        layers = [
            {"layer": number, **info.layers[number], "recall": recall.get(number), **quick_dict(heads)}
            for number, heads in by_layer.items()
        ]
        print_json(_about(arguments.file, info) | {"layers": layers})
        return
    if overview:
        records = [quick_layer_record(heads) for heads in by_layer.values()]
    else:
        records = [record for heads in by_layer.values() for record in heads]
    records = with_recall(records, read_recall(info))
    if arguments.csv:
        print_csv(records)
        return
    print_text(_heading(arguments.file, info, numbers))
    print()
    if not info.density:
        print_text(f"A file of format {info.format_version} does not say its densities: --quick has no table of them.")
    elif overview:
        _print_layers(records)
    else:
        _print_heads(info, records, arguments.head, one_layer=len(numbers) == 1)
    if legend := _recall_legend(info, overview):
        print()
        print_text("\n".join(legend))


def _about(path: Path, info: MaskFileInfo) -> Record:
    """What the file says of itself as a whole, ready for JSON."""
    return {
        "file": str(path),
        "format_version": info.format_version,
        "config": info.config and info.config.to_dict(),
        "config_hash": info.config_hash,
        "model": info.model,
        "token_ids_hash": info.token_ids_hash,
        "dtype": info.dtype,
        "scoring": info.scoring,
        "library": info.library,
        "metadata": _users_metadata(info),
    }


def _heading(path: Path, info: MaskFileInfo, numbers: Sequence[int]) -> str:
    lines = [f"{path}: format {info.format_version}, {len(info.layers)} layer{'s' if len(info.layers) > 1 else ''}"]
    about: dict[str, list[str]] = {}
    for number in numbers:
        about.setdefault(describe_geometry(info.layers[number]), []).append(str(number))
    for text, layers in about.items():
        lines.append(text if len(about) == 1 else f"layer {', '.join(layers)}: {text}")
    if info.config is not None:
        alpha = info.config.alpha
        text = "none" if alpha is None else f"{alpha:g}" if not isinstance(alpha, tuple) else _range(alpha)
        settings = info.config.to_dict() | {"alpha": text}
        lines.append(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items()))
    told = {"model": info.model, "dtype": info.dtype, "token ids": info.token_ids_hash, "scoring": info.scoring}
    told |= {"written by": ", ".join(f"{name} {version}" for name, version in info.library.items())}
    lines += [f"{name}: {entry}" for name, entry in told.items() if entry]
    lines += [f"{name}: {entry}" for name, entry in _users_metadata(info).items()]
    return "\n".join(map(printable, lines))  # a file's own words are anybody's


def _range(alpha: tuple[float, ...]) -> str:
    return f"{min(alpha):g} to {max(alpha):g} by head"


def _users_metadata(info: MaskFileInfo) -> dict[str, str]:
    """All but the recall, which is told by layer and head."""
    return {name: entry for name, entry in info.metadata.items() if name != RECALL_ENTRY or not read_recall(info)}


def _print_layers(records: Sequence[Record], patterns: Sequence[str] = ()) -> None:
    header = ["layer", "density", "min–max", "dense", "recall", "least head", *patterns, "heads' IoU", "IoU above"]
    rows = [
        [
            str(record["layer"]),
            _percent(record["density"]),
            f"{100 * record['density_least']:.1f}–{100 * record['density_most']:.1f}",
            str(record.get("dense_heads") or ""),
            _shown(record["recall"], 1, 3),
            _shown(record["recall_least_head"], 1, 3),
            *(_shown(record.get(name), 100, 1) for name in patterns),
            _shown(record.get("iou_of_heads"), 1, 2),
            _shown(record.get("iou_above"), 1, 2),
        ]
        for record in records
    ]
    print_table(header, rows)


def _print_heads(
    info: MaskFileInfo, records: Sequence[Record], head: int | None, patterns: Sequence[str] = (), *, one_layer: bool
) -> None:
    header = ["head" if one_layer else f"head {head}", "density", "", "recall", "least row", "blocks a row", *patterns]
    header += ["nearest", "IoU above"]
    rows = []
    for record in records:
        blocks = [record.get(f"blocks_{which}") for which in ("least", "median", "most")]
        nearest = record.get("nearest")
        rows.append(
            [
                row_name(info, record["layer"], record["batch"], record["head"], one_layer=one_layer),
                _percent(record["density"]),
                "dense" if record.get("dense") else "",
                _shown(record["recall"], 1, 3),
                _shown(record["recall_least"], 1, 3),
                "" if None in blocks else "/".join(map(str, blocks)),
                *(_shown(record.get(name), 100, 1) for name in patterns),
                "" if nearest is None else f"{nearest} ({record['nearest_iou']:.2f})",
                _shown(record.get("iou_above"), 1, 2),
            ]
        )
    print_table(header, rows)


def _print_profile(info: MaskFileInfo, layer: int, summary: HeadSummary) -> None:
    """How many blocks query blocks keep along the prompt, each line an equal number of them."""
    from flexprefill.plotting import token_label  # imports torch

    sizes = info.layers[layer]
    geometry = geometry_of(sizes)
    visible = visible_blocks(geometry, "cpu")
    rows = summary.counts.shape[0]
    step = -(-rows // PROFILE_LINES)
    means = [float(part.float().mean()) for part in summary.counts.split(step)]
    seen = [int(part.sum()) for part in visible.split(step)]
    kept = [int(part.sum()) for part in summary.counts.split(step)]
    lines = []
    for index, mean in enumerate(means):
        first = index * step * geometry.block_size
        last = min(first + step * geometry.block_size, geometry.q_len)
        lines.append(
            [
                f"{token_label(first + geometry.offset)} – {token_label(last + geometry.offset)}",
                f"{mean:.1f}",
                _percent(kept[index] / seen[index]),
                "#" * round(PROFILE_BAR_WIDTH * mean / max(1.0, *means)),
            ]
        )
    print_table(["query tokens", "blocks a row", "density", ""], lines)


def _legend(info: MaskFileInfo, layers: Sequence[LayerSummary], overview: bool) -> str:
    """What the columns are; only what the table has."""
    rule = (
        "by the file's settings"
        if info.config
        else "by the default sinks and window; the file has no settings, so last rows are not told apart"
    )
    dense = [summary.dense for layer in layers for summary in layer.heads]
    lines = []
    if any(dense):
        lines.append("dense: heads that keep every causal block" if overview else "dense: keeps every causal block")
    lines += _recall_legend(info, overview)
    if not overview:
        lines.append("blocks a row: key blocks that a query block keeps, least/median/most")
    if not all(dense):
        whose = " of heads that are not dense" if overview and any(dense) else ""
        lines.append(f"sink … scattered: % of the kept blocks{whose} ({rule})")
    if len(layers) > 1:
        lines.append("IoU above: same heads, with the layer of the line above, where shapes agree")
    return "\n".join(lines)


def _recall_legend(info: MaskFileInfo, overview: bool) -> list[str]:
    if not read_recall(info):
        return []
    least = "least head: recall of the head" if overview else "least row: share of the query"
    return [
        "recall: kept share of the exact attention mass, of queries that can lose some",
        f"{least} that keeps least",
    ]


def _draw(
    path: Path, info: MaskFileInfo, numbers: Sequence[int], head: int | None, picture: Path, *, overview: bool
) -> None:
    from flexprefill.plotting import plot_heads, plot_layers  # imports torch

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


def _shown(value: float | None, factor: int, digits: int) -> str:
    return "" if value is None else f"{factor * value:.{digits}f}"
