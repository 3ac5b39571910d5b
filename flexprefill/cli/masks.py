"""What the commands that read mask files share: the options, the choice of layers and heads, the reading.

torch is imported where masks are read: what a header says is told without.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexprefill.cli.kinds import kind_of
from flexprefill.cli.values import whole
from flexprefill.errors import FlexPrefillError, MaskFileError
from flexprefill.runtime.progress import terminal_stage
from flexprefill.store import MaskFileInfo, read_mask_info
from flexprefill.store.contents import geometry_of

if TYPE_CHECKING:
    from flexprefill.blockmap.map import BlockMap


def add_choice_arguments(parser: argparse.ArgumentParser) -> None:
    """The options --layer, --head, and one of --csv, --json and --png."""
    parser.add_argument("--layer", type=whole(0), metavar="L", help="only this layer (default: all)")
    parser.add_argument("--head", type=whole(0), metavar="H", help="only this query head (default: all)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--csv", action="store_true", help="print the table as CSV, its numbers in full")
    output.add_argument("--json", action="store_true", help="print JSON instead of a table")
    output.add_argument("--png", type=_picture, metavar="OUT", help="draw into this file instead")


def read_info(path: Path) -> MaskFileInfo:
    """As :func:`flexprefill.read_mask_info`; its error says what a file is that is no mask file."""
    try:
        return read_mask_info(path)
    except MaskFileError as error:
        kind = kind_of(path)
        if kind is None:
            raise
        raise MaskFileError(
            f"{path} is no mask file but {kind}; flexprefill.save_masks(path, masks) makes mask files"
        ) from error


def check_choice(path: Path, info: MaskFileInfo, layer: int | None, head: int | None) -> None:
    """Raises FlexPrefillError unless the file has this layer, and this head in every layer that is asked for."""
    if layer is not None and layer not in info.layers:
        raise FlexPrefillError(f"argument --layer: {path} has the layers {ranges(list(info.layers))}, not {layer}")
    for number in info.layers if layer is None else [layer]:
        heads = info.layers[number]["shape"][1]
        if head is not None and head >= heads:
            raise FlexPrefillError(
                f"argument --head: layer {number} of {path} has the heads {ranges(range(heads))}, not {head}"
            )


def read_layer(path: Path, layer: int, head: int | None) -> BlockMap:
    """One layer's map, of one head or of all."""
    from flexprefill.store.reading import load_masks  # imports torch

    return load_masks(path, layers=[layer], heads=None if head is None else [head])[layer]


def head_name(info: MaskFileInfo, layer: int, batch: int, head: int) -> str:
    """A head's name within its layer, with the batch entry where there are several."""
    return f"head {head}" if info.layers[layer]["shape"][0] == 1 else f"batch {batch}, head {head}"


def row_name(info: MaskFileInfo, layer: int, batch: int, head: int, *, one_layer: bool) -> str:
    """What a table calls a head: its name, or where there are several layers of one head, the layer's."""
    if one_layer:
        return head_name(info, layer, batch, head)
    return f"layer {layer}" if info.layers[layer]["shape"][0] == 1 else f"layer {layer}, batch {batch}"


def as_panels(path: Path, info: MaskFileInfo, layers: Sequence[int], head: int | None) -> tuple[BlockMap, list[str]]:
    """The chosen heads of all batch entries and layers as the heads of one map [1, K, M, N], and their names.

    Raises:
        FlexPrefillError: the layers are not of one length.
    """
    first = info.layers[layers[0]]
    other = [layer for layer in layers if geometry_of(info.layers[layer]) != geometry_of(first)]
    if other:
        raise FlexPrefillError(
            f"argument --layer: the layers of {path} are not of one length and need a picture each, "
            f"such as those of layers {layers[0]} and {other[0]}"
        )
    import torch

    from flexprefill.blockmap.map import BlockMap

    words, titles = [], []
    with terminal_stage("reading layers", len(layers)) as advance:
        for layer in layers:
            block_map = read_layer(path, layer, head)
            words.append(block_map.words.flatten(0, 1))
            for batch in range(block_map.shape[0]):
                for index in range(block_map.shape[1]) if head is None else [head]:
                    titles.append(f"layer {layer}, {head_name(info, layer, batch, index)}")
            advance(1)
    q_len, kv_len, block_size = geometry_of(first)
    return BlockMap(torch.cat(words)[None], q_len, kv_len, block_size), titles


def describe_geometry(sizes: dict[str, Any]) -> str:
    """A layer's lengths and heads, in words."""
    q_len, kv_len, block_size = geometry_of(sizes)
    batch, heads = sizes["shape"]
    tokens = f"{kv_len:,} tokens" if q_len == kv_len else f"the last {q_len:,} of {kv_len:,} tokens"
    entries = "" if batch == 1 else f"{batch} batch entries of "
    return f"{tokens} in blocks of {block_size}, {entries}{heads} head{'s' if heads > 1 else ''}"


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, those in a row as first … last."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(" … ".join(map(str, dict.fromkeys((run[0], run[-1])))) for run in runs)


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"must end in .png, got {text!r}")
    return path
