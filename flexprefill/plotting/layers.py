"""Pictures of one number a head, by layer and head."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flexprefill.blockmap.html import DROPPED, KEPT
from flexprefill.plotting.canvas import (
    BAR_WIDTH,
    BOTTOM,
    LEFT,
    RIGHT,
    add_axes,
    add_colour_bar,
    check_picture_path,
    colour_map,
    given_axes,
    new_figure,
    save_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LAYERS_TOP = 40
LAYERS_WIDTH, LAYERS_HEIGHT = 1000, 1000  # the aim for the panel, in pixels
MIN_CELL, MAX_CELL = 8, 72
LABEL_PIXELS = 44  # from one tick label to the next, at least
ROUND = (1, 1.2, 1.6, 2, 3, 4, 6, 8)  # ends of a scale, whose halves are round as well
SCALE = (DROPPED, "#7ea6d0", KEPT, "#08203f")


def plot_layers(
    values: Mapping[int, Tensor],
    path: str | os.PathLike[str] | None = None,
    *,
    label: str,
    ax: Axes | None = None,
) -> Axes:
    """Draws one share a head as a heat map: layers down, heads to the right.

    The scale runs from 0 to the largest share, rounded up; a head that a layer has not is blank.

    Args:
        values: by layer, shares in 0 … 1 by head, such as ``block_map.density()[0]`` or ``recall.mean[0]``: float [H];
            layers may differ in H.
        path: the picture's file; its suffix says which kind (``.png``). One that exists is replaced. None writes none.
        label: what the shares are, for the scale.
        ax: matplotlib Axes to draw in. None makes a new figure: without a path one of pyplot's, as notebooks show.

    Returns:
        The axes; ``axes.figure`` is the figure.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        FlexPrefillError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"values must be a mapping of layers to tensors [H], got {type(values).__name__}")
    if not values:
        raise ValueError("values must hold at least one layer, got none")
    for layer, shares in values.items():
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"values must have layer numbers as keys, got {layer!r}")
        if not isinstance(shares, Tensor) or not shares.is_floating_point() or shares.dim() != 1 or not shares.numel():
            found = f"{shares.dtype} {list(shares.shape)}" if isinstance(shares, Tensor) else type(shares).__name__
            raise TypeError(f"values[{layer}] must be a float tensor [H], got {found}")
        if not bool(((shares >= 0) & (shares <= 1)).all()):  # false for NaN as well
            raise ValueError(f"values[{layer}] must be shares in 0 … 1, got {shares.min():g} … {shares.max():g}")
    check_picture_path(path)

    layers, heads = sorted(values), max(shares.numel() for shares in values.values())
    cells = torch.full((len(layers), heads), torch.nan)
    for row, layer in enumerate(layers):
        cells[row, : values[layer].numel()] = values[layer].float().cpu()
    cell_width, cell_height = _cell_size(LAYERS_WIDTH, heads), _cell_size(LAYERS_HEIGHT, len(layers))
    width, height = heads * cell_width, len(layers) * cell_height
    if ax is None:
        figure = new_figure(LEFT + max(width, BAR_WIDTH) + RIGHT, LAYERS_TOP + height + BOTTOM, path)
        axes = add_axes(figure, LEFT, BOTTOM, width, height)
    else:
        (axes,) = given_axes(ax, 1)
        cell_width, cell_height = int(axes.bbox.width / heads), int(axes.bbox.height / len(layers))
    top = _round_up(float(cells.nan_to_num().max()))
    image = axes.imshow(
        cells.numpy(), cmap=colour_map(*SCALE), vmin=0, vmax=top, aspect="auto", interpolation="nearest", zorder=3
    )
    columns, rows = _labelled(heads, cell_width), _labelled(len(layers), cell_height)
    axes.set_xticks(columns, [str(column) for column in columns])
    axes.set_yticks(rows, [str(layers[row]) for row in rows])
    axes.tick_params(labelsize=9, length=2, width=0.5, pad=2)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("head", fontsize=10)
    axes.set_ylabel("layer", fontsize=10)
    if ax is None:
        add_colour_bar(figure, image, LEFT + max(width, BAR_WIDTH) / 2, label, [0, top / 2, top])
    else:
        axes.figure.colorbar(image, ax=axes, label=label, ticks=[0, top / 2, top])
    save_figure(axes, path)
    return axes


def _cell_size(aim: int, cells: int) -> int:
    return min(MAX_CELL, max(MIN_CELL, round(aim / cells)))


def _labelled(cells: int, pixels: int) -> list[int]:
    """Which of the cells have a label: all, or each second, fourth, …"""
    step = 1
    while step * max(1, pixels) < LABEL_PIXELS:
        step *= 2
    return list(range(0, cells, step))


def _round_up(share: float) -> float:
    """The least round number that is no smaller, at most 1; 1 for 0."""
    if share == 0:
        return 1.0
    share *= 1 - 1e-6  # a float32 may be a little more than the round number it stands for
    power = math.floor(math.log10(share))
    steps = (factor * 10.0**exponent for exponent in (power, power + 1) for factor in ROUND)
    return min(1.0, next(step for step in steps if step >= share))
