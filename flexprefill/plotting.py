"""Pictures of maps and of times. matplotlib is optional, and imported only when something is drawn."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexprefill.blockmap import BlockMap, causal_blocks, unpack_bits
from flexprefill.errors import FlexPrefillError

MAX_CELLS = 512  # a side; larger maps are averaged down to it
PANEL_PIXELS = 512  # the aim for a panel's longer side; each cell gets a whole number of pixels
MIN_HEIGHT = 128  # pixels; of a panel with few query blocks
COLUMNS = 4
DPI = 200
KEPT, DROPPED = "#14508c", "#e3e7ed"
# pixels around the panels: titles and axis labels
LEFT, RIGHT, TOP, BOTTOM, GAP_X, GAP_Y = 170, 50, 80, 200, 120, 190
# pixels of a picture of times: the whole, the margins around the axes, and from one label to the next
TIMES_WIDTH, TIMES_HEIGHT = 1900, 1240
TIMES_LEFT, TIMES_RIGHT, TIMES_TOP, TIMES_BOTTOM = 180, 520, 140, 150
LABEL_STEP = 42
PART_COLOURS = ("#1b9e77", "#d95f02", "#7570b3", "#a6761d", "#e7298a", "#4d9221")
DENSE_COLOURS = ("#2b2b2b", "#565656", "#747474", "#8c8c8c")
DENSE_DASHES = ((0, (6, 2)), (0, (3, 1.5)), (0, (1, 1)), (0, (6, 2, 1, 2)))


@dataclass(frozen=True)
class TimeLine:
    """One line of a picture of times.

    Attributes:
        kind: "part", "whole" or "dense", which decides the look.
        times: milliseconds by length in tokens; at least one.
    """

    name: str
    kind: str
    times: Mapping[int, float]


def plot_heads(
    block_map: BlockMap,
    path: str | os.PathLike[str],
    *,
    titles: Sequence[str] | None = None,
    batch: int = 0,
) -> None:
    """Draws a map into a file, one panel a head: queries down, keys to the right, both in tokens.

    Kept blocks are dark, causal blocks that are dropped light, and the causal future is blank. A map of more
    than 512 blocks on a side is averaged: a cell then stands for several blocks, and its colour for the share
    of its causal blocks that is kept.

    Args:
        block_map: [B, H, M, N].
        path: the picture's file; its suffix says which kind (``.png``). One that exists is replaced.
        titles: a name for each head; "head 0", "head 1", … if None.
        batch: the batch entry to draw.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        FlexPrefillError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    if not isinstance(block_map, BlockMap):
        raise TypeError(f"block_map must be a BlockMap, got {type(block_map).__name__}")
    _check_path(path)
    batches, heads, rows, columns = block_map.shape
    if isinstance(batch, bool) or not isinstance(batch, int):
        raise TypeError(f"batch must be an int, got {batch!r}")
    if not 0 <= batch < batches:
        raise ValueError(f"batch must be one of 0 … {batches - 1}, got {batch}")
    titles = [f"head {head}" for head in range(heads)] if titles is None else titles
    if isinstance(titles, str) or not isinstance(titles, Sequence):
        raise TypeError(f"titles must be a list of names, got {titles!r}")
    if len(titles) != heads:
        raise ValueError(f"titles must have one entry for each of the {heads} heads, got {len(titles)}")

    factor = math.ceil(max(rows, columns) / MAX_CELLS)
    rows, columns = math.ceil(rows / factor), math.ceil(columns / factor)
    scale = max(1, round(PANEL_PIXELS / max(rows, columns)))
    width, height = columns * scale, rows * max(scale, math.ceil(MIN_HEIGHT / rows))
    figure, panels = _panel_grid(heads, width, height)

    density = block_map.density()[batch].tolist()
    for head, axes in enumerate(panels):
        image = _draw_panel(axes, block_map, batch, head, factor)
        axes.set_title(f"{titles[head]}, {100 * density[head]:.1f} % kept", fontsize=11, pad=7)
    for axes in panels[::COLUMNS]:
        axes.set_ylabel("query token", fontsize=10)
    for axes in panels[-COLUMNS:]:
        axes.set_xlabel("key token", fontsize=10)
    _add_key(figure, image, averaged=factor > 1)
    figure.savefig(path, facecolor="white")


def plot_times(lines: Sequence[TimeLine], path: str | os.PathLike[str], *, title: str) -> None:
    """Draws times against lengths into a file, both axes logarithmic; each line's name stands at its right end.

    Parts are thin and coloured, the whole is thick and blue, dense attention is grey and dashed.

    Args:
        lines: at least one.
        path: as in :func:`plot_heads`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        FlexPrefillError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    _check_path(path)
    if not lines or not all(line.times for line in lines):
        raise ValueError(f"lines must be at least one, each with a time, got {lines!r}")
    figure = _new_figure(TIMES_WIDTH, TIMES_HEIGHT)
    width = TIMES_WIDTH - TIMES_LEFT - TIMES_RIGHT
    height = TIMES_HEIGHT - TIMES_TOP - TIMES_BOTTOM
    axes = figure.add_axes(
        (TIMES_LEFT / TIMES_WIDTH, TIMES_BOTTOM / TIMES_HEIGHT, width / TIMES_WIDTH, height / TIMES_HEIGHT)
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted({length for line in lines for length in line.times})
    axes.set_xlim(lengths[0] / 1.15, lengths[-1] * 1.15)
    axes.set_xticks(lengths, [token_label(length) for length in lengths])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.set_xlabel("tokens", fontsize=10)
    axes.set_ylabel("milliseconds, median", fontsize=10)
    axes.set_title(title, fontsize=11, pad=12, loc="left")
    axes.grid(True, color=DROPPED, linewidth=0.8)
    axes.tick_params(labelsize=9, length=0, pad=5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9aa3af")

    looks = _looks(lines)
    for line, look in zip(lines, looks, strict=True):
        lengths_of_line = sorted(line.times)
        axes.plot(lengths_of_line, [line.times[length] for length in lengths_of_line], **look)
    _label_ends(axes, lines, [look["color"] for look in looks], height)
    figure.savefig(path, facecolor="white")


def spread(positions: Sequence[float], step: float, low: float, high: float) -> list[float]:
    """Moves positions apart to at least ``step`` each, in their order and as near as may be, inside low … high.

    Where that is too narrow, they are evenly spaced.
    """
    order = sorted(range(len(positions)), key=positions.__getitem__)
    step = min(step, (high - low) / max(1, len(positions) - 1))
    # groups of touching positions: each lies around the mean of what its members want
    groups: list[list[int]] = []
    starts: list[float] = []

    def start_of(group: list[int]) -> float:
        wanted = sum(positions[index] - place * step for place, index in enumerate(group)) / len(group)
        return min(max(wanted, low), high - (len(group) - 1) * step)

    for index in order:
        groups.append([index])
        starts.append(start_of(groups[-1]))
        while len(groups) > 1 and starts[-2] + len(groups[-2]) * step > starts[-1]:
            groups[-2:] = [groups[-2] + groups[-1]]
            starts[-2:] = [start_of(groups[-1])]
    placed = list(positions)
    for group, start in zip(groups, starts, strict=True):
        for place, index in enumerate(group):
            placed[index] = start + place * step
    return placed


def kept_shares(kept: Tensor, causal: Tensor, factor: int) -> Tensor:
    """The kept share of the causal blocks in each cell of factor × factor blocks.

    Args:
        kept, causal: bool [M, N].

    Returns:
        float32 [ceil(M / factor), ceil(N / factor)], NaN where a cell has no causal block.
    """
    return _cell_sums(kept & causal, factor) / _cell_sums(causal, factor)


def _cell_sums(blocks: Tensor, factor: int) -> Tensor:
    rows, columns = blocks.shape
    padded = torch.nn.functional.pad(blocks, (0, -columns % factor, 0, -rows % factor))
    return padded.unflatten(1, (-1, factor)).unflatten(0, (-1, factor)).sum((1, 3)).float()


def token_ticks(first: int, last: int) -> list[int]:
    """Two to five positions from ``first`` to ``last``, multiples of a power of two."""
    step = 1
    while 4 * step < last - first:
        step *= 2
    return list(range(math.ceil(first / step) * step, last + 1, step))


def token_label(tokens: int) -> str:
    """A number of tokens, whole multiples of 1,024 as K."""
    return f"{tokens // 1024}K" if tokens and tokens % 1024 == 0 else str(tokens)


def _check_path(path: str | os.PathLike[str]) -> None:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a file name, got {type(path).__name__}")
    if not Path(path).suffix:
        raise ValueError(f"path must end in the kind of picture, such as .png, got {str(path)!r}")


def _new_figure(width: int, height: int) -> Any:
    """An empty figure of width × height pixels."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FlexPrefillError("drawing needs matplotlib: pip install 'flexprefill[viz]'") from error
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def _panel_grid(heads: int, width: int, height: int) -> tuple[Any, list[Any]]:
    """A figure with one axes of exactly width × height pixels for each head."""
    columns = min(heads, COLUMNS)
    rows = math.ceil(heads / columns)
    total_width = LEFT + columns * width + (columns - 1) * GAP_X + RIGHT
    total_height = TOP + rows * height + (rows - 1) * GAP_Y + BOTTOM
    figure = _new_figure(total_width, total_height)
    panels = []
    for head in range(heads):
        row, column = divmod(head, columns)
        left = LEFT + column * (width + GAP_X)
        bottom = BOTTOM + (rows - 1 - row) * (height + GAP_Y)
        box = (left / total_width, bottom / total_height, width / total_width, height / total_height)
        panels.append(figure.add_axes(box))
    return figure, panels


def _draw_panel(axes: Any, block_map: BlockMap, batch: int, head: int, factor: int) -> Any:
    """Draws one head's cells and ticks, and returns the image."""
    from matplotlib.colors import LinearSegmentedColormap

    kept = unpack_bits(block_map.words[batch, head].cpu(), block_map.shape[3])
    causal = causal_blocks(block_map.q_len, block_map.kv_len, block_map.block_size, "cpu")
    shares = kept_shares(kept, causal, factor)
    cell, offset = factor * block_map.block_size, block_map.offset
    image = axes.imshow(
        shares.numpy(),
        cmap=LinearSegmentedColormap.from_list("kept", [DROPPED, KEPT]).with_extremes(bad="white"),
        vmin=0,
        vmax=1,
        extent=(0, shares.shape[1] * cell, offset + shares.shape[0] * cell, offset),
        aspect="auto",
        interpolation="nearest",  # exact, since each cell is a whole number of pixels
        zorder=3,  # above the tick marks, which begin half inside the panel
    )
    for axis, first in ((axes.xaxis, 0), (axes.yaxis, offset)):
        axis.set_ticks(ticks := token_ticks(first, block_map.kv_len), [token_label(tick) for tick in ticks])
    axes.tick_params(labelsize=9, length=2, width=0.5, pad=2)
    axes.spines[:].set_visible(False)  # a frame would cover part of the outer cells
    return image


def _add_key(figure: Any, image: Any, *, averaged: bool) -> None:
    """What the colours mean, below the panels: two patches, or a colour bar where cells are averages."""
    from matplotlib.patches import Patch

    if averaged:
        width, height = figure.get_size_inches() * DPI
        bar = figure.add_axes((0.5 - 150 / width, 62 / height, 300 / width, 16 / height))
        figure.colorbar(image, cax=bar, orientation="horizontal", ticks=[0, 0.5, 1])
        bar.set_title("share of a cell's blocks that is kept", fontsize=8, pad=3)
        bar.tick_params(labelsize=8, length=2, width=0.5)
        return
    patches = [Patch(color=KEPT, label="kept block"), Patch(color=DROPPED, label="dropped block")]
    figure.legend(handles=patches, loc="lower center", ncols=2, frameon=False, fontsize=10, borderaxespad=0.8)


def _looks(lines: Sequence[TimeLine]) -> list[dict[str, Any]]:
    """How matplotlib is to draw each line."""
    parts, dense = itertools.cycle(PART_COLOURS), itertools.cycle(zip(DENSE_COLOURS, DENSE_DASHES, strict=True))
    looks: list[dict[str, Any]] = []
    for line in lines:
        if line.kind == "whole":
            looks.append({"color": KEPT, "linewidth": 2.8, "marker": "o", "markersize": 5, "zorder": 4})
        elif line.kind == "part":
            looks.append({"color": next(parts), "linewidth": 1.3, "marker": "o", "markersize": 3, "zorder": 3})
        else:
            colour, dash = next(dense)
            looks.append({"color": colour, "linewidth": 1.5, "linestyle": dash, "marker": "s", "markersize": 3})
    return looks


def _label_ends(axes: Any, lines: Sequence[TimeLine], colours: Sequence[str], height: int) -> None:
    """Each line's name right of the axes, moved apart where ends are close, with a thin line from its end."""
    axes.autoscale_view()  # which is otherwise put off until the picture is drawn
    ends = [(max(line.times), line.times[max(line.times)]) for line in lines]
    pixels = [axes.transData.transform(end) for end in ends]
    left, bottom = axes.transAxes.transform((0, 0))
    right = axes.transAxes.transform((1, 0))[0]
    places = spread([y - bottom for _, y in pixels], LABEL_STEP, 0, height)
    for line, colour, end, place in zip(lines, colours, ends, places, strict=True):
        axes.annotate(
            line.name,
            xy=end,
            xytext=(1 + 26 / (right - left), place / height),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            fontweight="bold" if line.kind == "whole" else "normal",
            color=colour,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "alpha": 0.6,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )
