"""Pictures of where two maps differ."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flexprefill.blockmap.cells import cell_factor, head_shares, shade
from flexprefill.blockmap.html import DROPPED, rgb
from flexprefill.blockmap.map import BlockMap, check_index
from flexprefill.inspection import compare_maps
from flexprefill.plotting.canvas import (
    BAR_BOTTOM,
    BAR_HEIGHT,
    DPI,
    add_axes,
    add_patches,
    check_picture_path,
    check_titles,
    colour_patches,
    draw_cells,
    figure_of,
    panel_grid,
    panel_pixels,
    save_figure,
    style_bar,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BOTH, ONLY_FIRST, ONLY_SECOND = "#8b98ab", "#d9480f", "#0b8a7d"
SCALE_WIDTH, SCALE_GAP = 150, 40  # of each of three colour scales, in pixels
SCALE_STEPS = 64


def plot_difference(
    first: BlockMap,
    second: BlockMap,
    path: str | os.PathLike[str] | None = None,
    *,
    ax: Axes | Iterable[Axes] | None = None,
    names: tuple[str, str] = ("first", "second"),
    titles: Sequence[str] | None = None,
    batch: int = 0,
) -> list[Axes]:
    """Draws two maps in three colours, one panel a head: kept by both, only by one, only by the other.

    Causal blocks that both drop are light, and the causal future is blank. A map of more than 512 blocks on a
    side, 1,024 if it has one head, is averaged: a cell then stands for several blocks. Its colour goes from light to
    that of both by the root of the share that both keep, and from there to that of the differing blocks by the root
    of the share that differs, so that one block of a cell is seen; scales below the panels of a new figure show it.

    Args:
        first, second: [B, H, M, N] of the same lengths.
        path: the picture's file; its suffix says which kind (``.png``). One that exists is replaced. None writes none.
        ax: matplotlib Axes to draw in, one for each head. None makes a new figure: without a path one of pyplot's, as
            notebooks show.
        names: what to call the two maps.
        titles: a name for each head; "head 0", "head 1", … if None.
        batch: the batch entry to draw.

    Returns:
        The axes, one for each head; ``axes[0].figure`` is the figure.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        FlexPrefillError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    difference = compare_maps(first, second)
    check_picture_path(path)
    check_index("batch", batch, first.shape[0])
    titles = check_titles(titles, first.shape[1])
    if not isinstance(names, (tuple, list)) or len(names) != 2:
        raise TypeError(f"names must be two names, got {names!r}")

    factor = cell_factor(first.geometry, panel_pixels(first.shape[1]))
    panels = panel_grid(first, factor, ax, path)
    parts = _parts(first, second)
    iou = difference.iou
    for head, axes in enumerate(panels):
        shares = [head_shares(part.words[batch, head], part.geometry, factor) for part in parts]
        draw_cells(axes, mix(*shares), first, factor)
        verdict = "equal" if iou[batch, head] == 1 else f"IoU {float(iou[batch, head]):.3f}"
        axes.set_title(f"{titles[head]}, {verdict}", fontsize=11, pad=7)
    labels = {"both": BOTH, f"only {names[0]}": ONLY_FIRST, f"only {names[1]}": ONLY_SECOND}
    colours = {**labels, "neither": DROPPED}
    if ax is not None:
        panels[0].legend(handles=colour_patches(colours), loc="upper right", fontsize=8)  # in the causal future
    elif factor == 1:
        add_patches(figure_of(panels[0]), colours)
    else:
        _add_scales(figure_of(panels[0]), labels, factor)
    save_figure(panels[0], path)
    return panels


def mix(both: Tensor, only_first: Tensor, only_second: Tensor) -> Tensor:
    """The colours of cells by their shares.

    Args:
        both, only_first, only_second: shares of a cell's causal blocks, float32 [r, c]; NaN where it has none.

    Returns:
        float32 [r, c, 3] in 0 … 1.
    """
    dropped, kept, first, second = map(rgb, (DROPPED, BOTH, ONLY_FIRST, ONLY_SECOND))
    differing = only_first + only_second
    part_first = torch.where(differing > 0, only_first / differing, 0.0)[..., None]
    base = dropped + (kept - dropped) * shade(both)[..., None]
    hue = second + (first - second) * part_first
    cells = base + (hue - base) * shade(differing)[..., None]
    return torch.where(both.isnan()[..., None], torch.ones(3), cells).clamp(0, 1)


def _parts(first: BlockMap, second: BlockMap) -> tuple[BlockMap, BlockMap, BlockMap]:
    """The blocks that both keep, that only the first and that only the second keeps."""
    differing = first ^ second
    return first & second, first & differing, second & differing


def _add_scales(figure: Figure, labels: dict[str, str], factor: int) -> None:
    """A scale for each colour, on the left of which are cells that neither map keeps anything of."""
    width = figure.get_size_inches()[0] * DPI
    left = (width - len(labels) * SCALE_WIDTH - (len(labels) - 1) * SCALE_GAP) / 2
    ramp = torch.linspace(0, 1, SCALE_STEPS)[None] ** 2  # so that shades are even
    nothing = torch.zeros_like(ramp)
    for place, label in enumerate(labels):
        shares = [ramp if part == place else nothing for part in range(3)]
        bar = add_axes(figure, left + place * (SCALE_WIDTH + SCALE_GAP), BAR_BOTTOM, SCALE_WIDTH, BAR_HEIGHT)
        bar.imshow(mix(*shares).numpy(), extent=(0, 1, 0, 1), aspect="auto")
        bar.set_xticks([0, 0.5, 1], ["0", "0.25", "1"])
        bar.set_yticks([])
        style_bar(bar, label)
    figure.text(
        0.5,
        6 / (figure.get_size_inches()[1] * DPI),
        f"share of the {factor} × {factor} blocks of a cell",
        ha="center",
        fontsize=8,
    )
