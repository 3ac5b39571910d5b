"""Pictures of a map's heads."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from flexprefill.blockmap.cells import cell_factor, head_shares
from flexprefill.blockmap.html import DROPPED, KEPT
from flexprefill.blockmap.map import BlockMap, check_has_bits, check_index
from flexprefill.plotting.canvas import (
    DPI,
    add_colour_bar,
    add_patches,
    check_picture_path,
    check_titles,
    colour_map,
    colour_patches,
    draw_cells,
    figure_of,
    panel_grid,
    panel_pixels,
    save_figure,
    share_norm,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_heads(
    block_map: BlockMap,
    path: str | os.PathLike[str] | None = None,
    *,
    ax: Axes | Iterable[Axes] | None = None,
    titles: Sequence[str] | None = None,
    batch: int = 0,
) -> list[Axes]:
    """Draws a map, one panel a head: queries down, keys to the right, both in tokens.

    Kept blocks are dark, causal blocks that are dropped light, and the causal future is blank. A map of more
    than 512 blocks on a side, 1,024 if it has one head, is averaged: a cell then stands for several blocks, and its
    colour goes by the square root of the share of its causal blocks that is kept, so that one of them is seen; a
    scale shows it.

        figure, axes = plt.subplots(1, 2)
        plot_heads(block_map, ax=axes)  # of two heads

    Args:
        block_map: [B, H, M, N].
        path: the picture's file; its suffix says which kind (``.png``). One that exists is replaced. None writes none.
        ax: matplotlib Axes to draw in, one for each head. None makes a new figure: without a path one of pyplot's, as
            notebooks show.
        titles: a name for each head; "head 0", "head 1", … if None.
        batch: the batch entry to draw.

    Returns:
        The axes, one for each head; ``axes[0].figure`` is the figure.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        FlexPrefillError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    check_has_bits("block_map", block_map)
    check_picture_path(path)
    check_index("batch", batch, block_map.shape[0])
    titles = check_titles(titles, block_map.shape[1])

    factor = cell_factor(block_map.geometry, panel_pixels(block_map.shape[1]))
    panels = panel_grid(block_map, factor, ax, path)
    cmap, norm = colour_map(DROPPED, KEPT), share_norm()
    density = block_map.density()[batch].tolist()
    for head, axes in enumerate(panels):
        cells = head_shares(block_map.words[batch, head], block_map.geometry, factor)
        image = draw_cells(axes, cells, block_map, factor, cmap=cmap, norm=norm)
        axes.set_title(f"{titles[head]}, {100 * density[head]:.1f} % kept", fontsize=11, pad=7)
    figure, colours = figure_of(panels[0]), {"kept block": KEPT, "dropped block": DROPPED}
    label = f"kept share of the {factor} × {factor} blocks of a cell"
    if ax is not None and factor == 1:
        panels[0].legend(handles=colour_patches(colours), loc="upper right", fontsize=8)  # in the causal future
    elif ax is not None:
        figure.colorbar(image, ax=panels, label=label, ticks=[0, 0.25, 1])
    elif factor == 1:
        add_patches(figure, colours)
    else:
        add_colour_bar(figure, image, figure.get_size_inches()[0] * DPI / 2, label, [0, 0.25, 1])
    save_figure(panels[0], path)
    return panels
