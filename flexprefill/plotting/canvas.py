"""What all pictures share: colours, the figure, panels of whole pixels, axes in tokens."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexprefill.blockmap.map import BlockMap
from flexprefill.errors import FlexPrefillError
from flexprefill.runtime.files import check_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.patches import Patch
    from torch import Tensor

# the aim for a panel's longer side, one of several and one alone; each cell gets a whole number of pixels, and
# a map of more blocks is averaged down to as many cells
SIDE_PIXELS, LONE_SIDE_PIXELS = 512, 1024
MIN_HEIGHT = 128  # pixels; of a panel with few query blocks
COLUMNS = 4
DPI = 200
# pixels around the panels: titles and axis labels
LEFT, RIGHT, TOP, BOTTOM, GAP_X, GAP_Y = 170, 50, 80, 200, 120, 190
BAR_WIDTH, BAR_HEIGHT, BAR_BOTTOM = 300, 16, 62  # of a colour scale below the panels, in pixels
KIBI, MEBI = 1024, 1024**2


def token_ticks(first: int, last: int) -> list[int]:
    """Two to five positions from ``first`` to ``last``, multiples of a power of two."""
    step = 1
    while 4 * step < last - first:
        step *= 2
    return list(range(math.ceil(first / step) * step, last + 1, step))


def token_label(tokens: int) -> str:
    """A number of tokens, whole multiples of 1,024 as K and of 1,048,576 as M."""
    for unit, sign in ((MEBI, "M"), (KIBI, "K")):
        if tokens and tokens % unit == 0:
            return f"{tokens // unit}{sign}"
    return str(tokens)


def panel_pixels(heads: int) -> int:
    """The aim for a panel's longer side, and the most cells on it."""
    return LONE_SIDE_PIXELS if heads == 1 else SIDE_PIXELS


def check_picture_path(path: str | os.PathLike[str] | None) -> None:
    """Raises unless a picture's path is None or a file name with a suffix."""
    if path is None:
        return
    check_path(path)
    if not Path(path).suffix:
        raise ValueError(f"path must end in the kind of picture, such as .png, got {str(path)!r}")


def check_titles(titles: Sequence[str] | None, heads: int) -> Sequence[str]:
    """The titles, "head 0", "head 1", … if None; raises unless there is one for each head."""
    titles = [f"head {head}" for head in range(heads)] if titles is None else titles
    if isinstance(titles, str) or not isinstance(titles, Sequence):
        raise TypeError(f"titles must be a list of names, got {titles!r}")
    if len(titles) != heads:
        raise ValueError(f"titles must have one entry for each of the {heads} heads, got {len(titles)}")
    return titles


def given_axes(ax: Any, count: int) -> list[Axes]:
    """The caller's axes, one for each of so many panels; raises unless they are."""
    try:
        from matplotlib.axes import Axes
    except ImportError as error:
        raise missing_matplotlib() from error
    found = [ax] if isinstance(ax, Axes) else list(getattr(ax, "flat", ax)) if isinstance(ax, Iterable) else [ax]
    if not all(isinstance(axes, Axes) for axes in found):
        raise TypeError(f"ax must be matplotlib Axes, or a list of them, got {type(ax).__name__}")
    if len(found) != count:
        raise ValueError(f"ax must be one Axes for each of the {count} panels, got {len(found)}")
    return found


def missing_matplotlib() -> FlexPrefillError:
    return FlexPrefillError("drawing needs matplotlib: pip install 'flexprefill[viz]'")


def new_figure(width: int, height: int, path: str | os.PathLike[str] | None) -> Figure:
    """An empty figure of width × height pixels: pyplot's, which notebooks and ``show`` know, if no file gets it."""
    size: dict[str, Any] = {"figsize": (width / DPI, height / DPI), "dpi": DPI}
    try:
        if path is None:
            from matplotlib import pyplot

            return pyplot.figure(**size)
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_matplotlib() from error
    figure = Figure(**size)
    FigureCanvasAgg(figure)
    return figure


def figure_of(axes: Axes) -> Figure:
    """The whole figure, also of axes in a part of one."""
    return axes.figure.canvas.figure


def save_figure(axes: Axes, path: str | os.PathLike[str] | None) -> None:
    """Writes the figure of some axes into a file, if there is one to write."""
    if path is not None:
        figure_of(axes).savefig(path, facecolor="white")


def add_axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at these pixels of a figure."""
    whole_width, whole_height = figure.get_size_inches() * DPI
    return figure.add_axes((left / whole_width, bottom / whole_height, width / whole_width, height / whole_height))


def panel_grid(block_map: BlockMap, factor: int, ax: Any, path: str | os.PathLike[str] | None) -> list[Axes]:
    """One axes for each head: the caller's, or those of a new figure, in which cells take a whole number of pixels."""
    heads = block_map.shape[1]
    if ax is not None:
        panels = given_axes(ax, heads)
        for axes in panels:
            axes.set(xlabel="key token", ylabel="query token")
        return panels
    cell_rows, cell_columns = (math.ceil(blocks / factor) for blocks in block_map.shape[2:])
    scale = max(1, round(panel_pixels(heads) / max(cell_rows, cell_columns)))
    width, height = cell_columns * scale, cell_rows * max(scale, math.ceil(MIN_HEIGHT / cell_rows))
    columns = min(heads, COLUMNS)
    rows = math.ceil(heads / columns)
    total_width = LEFT + columns * width + (columns - 1) * GAP_X + RIGHT
    total_height = TOP + rows * height + (rows - 1) * GAP_Y + BOTTOM
    figure = new_figure(total_width, total_height, path)
    panels = []
    for head in range(heads):
        row, column = divmod(head, columns)
        left, bottom = LEFT + column * (width + GAP_X), BOTTOM + (rows - 1 - row) * (height + GAP_Y)
        panels.append(add_axes(figure, left, bottom, width, height))
    for axes in panels[::COLUMNS]:
        axes.set_ylabel("query token", fontsize=10)
    for axes in panels[-COLUMNS:]:
        axes.set_xlabel("key token", fontsize=10)
    return panels


def draw_cells(axes: Axes, cells: Tensor, block_map: BlockMap, factor: int, **colours: Any) -> AxesImage:
    """Draws a panel's cells, numbers [r, c] or colours [r, c, 3], with ticks in tokens, and returns the image."""
    cell, offset = factor * block_map.block_size, block_map.offset
    image = axes.imshow(
        cells.numpy(),
        extent=(0, cells.shape[1] * cell, offset + cells.shape[0] * cell, offset),
        aspect="auto",
        interpolation="auto",  # exact where each cell is a whole number of pixels; no cell is passed over elsewhere
        zorder=3,  # above the tick marks, which begin half inside the panel
        **colours,
    )
    for axis, first in ((axes.xaxis, 0), (axes.yaxis, offset)):
        axis.set_ticks(ticks := token_ticks(first, block_map.kv_len), [token_label(tick) for tick in ticks])
    axes.tick_params(labelsize=9, length=2, width=0.5, pad=2)
    axes.spines[:].set_visible(False)  # a frame would cover part of the outer cells
    return image


def colour_map(*colours: str) -> Colormap:
    """A scale that runs through these colours, white for what has no number."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("scale", colours).with_extremes(bad="white")


def share_norm() -> Normalize:
    """Where a share stands on a scale: :func:`~flexprefill.blockmap.cells.shade` in matplotlib's terms."""
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, 0, 1)


def add_colour_bar(figure: Figure, image: AxesImage, centre: float, label: str, ticks: Sequence[float]) -> None:
    """A colour scale below the panels, its middle at pixel ``centre``."""
    bar = add_axes(figure, centre - BAR_WIDTH / 2, BAR_BOTTOM, BAR_WIDTH, BAR_HEIGHT)
    figure.colorbar(image, cax=bar, orientation="horizontal").set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.minorticks_off()
    style_bar(bar, label)


def style_bar(bar: Axes, label: str) -> None:
    """The look of a colour scale's title and ticks."""
    bar.set_title(label, fontsize=8, pad=3)
    bar.tick_params(labelsize=8, length=2, width=0.5)
    bar.spines[:].set_visible(False)


def colour_patches(colours: dict[str, str]) -> list[Patch]:
    """A patch of each colour, with its name."""
    from matplotlib.patches import Patch

    return [Patch(color=colour, label=name) for name, colour in colours.items()]


def add_patches(figure: Figure, colours: dict[str, str]) -> None:
    """A patch of each colour below the panels, with its name."""
    patches = colour_patches(colours)
    figure.legend(
        handles=patches,
        loc="lower center",
        ncols=len(patches),
        frameon=False,
        fontsize=9,
        borderaxespad=0.8,
        handlelength=1.2,
        columnspacing=1.4,
    )
