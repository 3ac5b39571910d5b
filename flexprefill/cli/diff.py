"""flexprefill diff: how two mask files differ."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flexprefill.cli.masks import (
    add_choice_arguments,
    as_panels,
    check_choice,
    describe_geometry,
    read_info,
    read_layer,
    row_name,
)
from flexprefill.cli.table import print_csv, print_json, print_named, print_table, print_text
from flexprefill.errors import FlexPrefillError
from flexprefill.inspection import MapDifference, compare_maps
from flexprefill.plotting import plot_difference, plot_layers
from flexprefill.plotting.difference import ONLY_FIRST, ONLY_SECOND
from flexprefill.runtime.progress import terminal_stage
from flexprefill.store import MaskFileInfo

DESCRIPTION = (
    "Compares the masks of two files, block by block; settings and other entries may differ. Prints one line a layer, "
    "or with --layer or --head one line a head: blocks that both keep, that only A and that only B keeps, and "
    "the IoU (intersection over union). --png draws the maps in three colours if --layer or --head is given or the "
    "files share just one layer, and else 1 − IoU by layer and head. Exit code 0 if the masks are equal, 1 if they "
    "differ, 2 if there was trouble."
)
EQUAL, DIFFERENT = 0, 1


@dataclass(frozen=True, eq=False)
class LayerDifference:
    """One layer of two files.

    Attributes:
        status: "compared", "other shape", "only A" or "only B".
        difference: what was counted; None unless the layer was compared.
    """

    number: int
    status: str
    difference: MapDifference | None = None

    @property
    def equal(self) -> bool:
        return self.difference is not None and self.difference.equal

    def to_dict(self, head: int | None) -> dict[str, Any]:
        """Everything, ready for JSON; ``head`` is the number of the one head that was read."""
        record: dict[str, Any] = {"layer": self.number, "status": self.status, "equal": self.equal}
        if self.difference is not None:
            record |= self.difference.to_dict()
            if head is not None:
                record["heads"] = [entry | {"head": head} for entry in record["heads"]]
        return record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name in ("first", "second"):
        parser.add_argument(name, type=Path, metavar="A" if name == "first" else "B", help=f"the {name} mask file")
    add_choice_arguments(parser)


def execute(arguments: argparse.Namespace) -> int:
    paths, layer, head = (arguments.first, arguments.second), arguments.layer, arguments.head
    infos = [read_info(path) for path in paths]
    for path, info in zip(paths, infos, strict=True):
        check_choice(path, info, layer, head)
    numbers = sorted({*infos[0].layers, *infos[1].layers}) if layer is None else [layer]
    layers = []
    with terminal_stage("comparing layers", len(numbers)) as advance:
        for number in numbers:
            layers.append(_compare(paths, infos, number, head))
            advance(1)
    code = EQUAL if all(layer.equal for layer in layers) else DIFFERENT
    if arguments.json:
        record = {
            "first": str(paths[0]),
            "second": str(paths[1]),
            "equal": code == EQUAL,
            "layers": [layer.to_dict(head) for layer in layers],
        }
        print_json(record)
        return code
    overview = layer is None and head is None
    if arguments.csv:
        print_csv(_layer_records(layers) if overview else _head_records(layers, head))
        return code
    if arguments.png:
        _draw(paths, infos, layers, head, arguments.png, overview=overview)
        print(f"picture  {arguments.png}")
        return code
    for name, path, colour in zip("AB", paths, (ONLY_FIRST, ONLY_SECOND), strict=True):
        print_named(name, str(path), colour)
    print()
    if overview:
        _print_layers(infos, layers)
    else:
        _print_heads(infos, layers, head)
    print("\nthe masks are equal" if code == EQUAL else "\nthe masks differ")
    return code


def _compare(paths: Sequence[Path], infos: Sequence[MaskFileInfo], number: int, head: int | None) -> LayerDifference:
    for info, other in ((infos[0], "only B"), (infos[1], "only A")):
        if number not in info.layers:
            return LayerDifference(number, other)
    maps = [read_layer(path, number, head) for path in paths]
    shapes = [(block_map.shape, block_map.q_len, block_map.kv_len, block_map.block_size) for block_map in maps]
    if shapes[0] != shapes[1]:
        return LayerDifference(number, "other shape")
    return LayerDifference(number, "compared", compare_maps(*maps))


def _layer_records(layers: Sequence[LayerDifference]) -> list[dict[str, Any]]:
    """Each layer in one line, for CSV."""
    records = []
    for layer in layers:
        found = layer.difference
        counts = dict.fromkeys(("both", "only_first", "only_second", "iou", "iou_least", "heads_differing"))
        if found is not None:
            counts = {name: int(getattr(found, name).sum()) for name in ("both", "only_first", "only_second")}
            counts |= {"iou": float(found.iou.mean()), "iou_least": float(found.iou.min())}
            counts["heads_differing"] = int(((found.only_first + found.only_second) > 0).sum())
        records.append({"layer": layer.number, "status": layer.status, "equal": layer.equal, **counts})
    return records


def _head_records(layers: Sequence[LayerDifference], head: int | None) -> list[dict[str, Any]]:
    """Each head in one line, for CSV; a layer that was not compared has one line."""
    records = []
    nothing = dict.fromkeys(("batch", "head", "iou", "both", "only_first", "only_second"))
    for layer in layers:
        for entry in layer.to_dict(head).get("heads", [nothing]):
            equal = layer.difference is not None and not entry["only_first"] + entry["only_second"]
            records.append({"layer": layer.number, "status": layer.status, "equal": equal, **entry})
    return records


def _print_layers(infos: Sequence[MaskFileInfo], layers: Sequence[LayerDifference]) -> None:
    rows = []
    for layer in layers:
        found = layer.difference
        if found is None:
            rows.append([str(layer.number), "", "", "", "", "", layer.status])
            continue
        unequal = int(((found.only_first + found.only_second) > 0).sum())
        counts = _counts(found.both.sum(), found.only_first.sum(), found.only_second.sum())
        heads = f"{unequal} of {found.both.numel()} heads differ" if unequal else "equal"
        rows.append([str(layer.number), *counts, f"{found.iou.mean():.4f}", f"{found.iou.min():.4f}", heads])
    print_table(
        ["layer", "both", "only A", "only B", "mean IoU", "least IoU", ""],
        rows,
        marked=[not layer.equal for layer in layers],
    )
    _print_shapes(infos, layers)


def _print_heads(infos: Sequence[MaskFileInfo], layers: Sequence[LayerDifference], head: int | None) -> None:
    rows, marked = [], []
    for layer in layers:
        if layer.difference is None:
            rows.append([f"layer {layer.number}", "", "", "", "", layer.status])
            marked.append(True)
            continue
        for entry in layer.to_dict(head)["heads"]:
            unequal = entry["only_first"] + entry["only_second"] > 0
            name = row_name(infos[0], layer.number, entry["batch"], entry["head"], one_layer=len(layers) == 1)
            counts = _counts(entry["both"], entry["only_first"], entry["only_second"])
            rows.append([name, *counts, f"{entry['iou']:.4f}", "differs" if unequal else "equal"])
            marked.append(unequal)
    print_table(
        ["head" if len(layers) == 1 else f"head {head}", "both", "only A", "only B", "IoU", ""], rows, marked=marked
    )
    _print_shapes(infos, layers)


def _print_shapes(infos: Sequence[MaskFileInfo], layers: Sequence[LayerDifference]) -> None:
    for layer in layers:
        if layer.status == "other shape":
            here, there = (describe_geometry(info.layers[layer.number]) for info in infos)
            print_text(f"layer {layer.number}: A has {here}; B has {there}")


def _draw(
    paths: Sequence[Path],
    infos: Sequence[MaskFileInfo],
    layers: Sequence[LayerDifference],
    head: int | None,
    picture: Path,
    *,
    overview: bool,
) -> None:
    found = {layer.number: layer.difference for layer in layers if layer.difference is not None}
    if not found:
        raise FlexPrefillError(f"argument --png: {paths[0]} and {paths[1]} have no layer of one shape to draw")
    if overview and len(found) > 1:
        plot_layers(
            {number: 1 - difference.iou.flatten() for number, difference in found.items()},
            picture,
            label="1 − IoU of A and B",
        )
        return
    (first, titles), (second, _) = (
        as_panels(path, info, list(found), head) for path, info in zip(paths, infos, strict=True)
    )
    plot_difference(first, second, picture, names=("A", "B"), titles=titles)


def _counts(*blocks: int | Tensor) -> list[str]:
    return [f"{int(number):,}" for number in blocks]
