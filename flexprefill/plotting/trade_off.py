"""Pictures of what methods lose against what they keep."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexprefill.blockmap.html import DROPPED, KEPT
from flexprefill.plotting.canvas import (
    DPI,
    add_axes,
    check_picture_path,
    figure_of,
    given_axes,
    new_figure,
    save_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# pixels: of a panel, and around it
PANEL_WIDTH, PANEL_HEIGHT = 640, 640
LEFT, RIGHT, TOP, BOTTOM, GAP, ROW_GAP = 170, 60, 150, 260, 110, 190
LOOKS = {  # of methods by name: colour and marker
    "flashprefill": (KEPT, "o"),
    "two-sided": ("#c2185b", "h"),
    "mean-correction": ("#1b9e77", "s"),
    "guard": ("#a6761d", "P"),
    "exact": ("#2b2b2b", "^"),
    "xattention": ("#d95f02", "D"),
    "prism": ("#e7298a", "v"),
    "minference": ("#66a61e", "<"),
    "byte-flexprefill": ("#8c510a", ">"),
    "random": ("#7570b3", "x"),
}
OTHERS = ("#5e5e5e", "*")


@dataclass(frozen=True)
class TradeOffPoint:
    """One method at one density.

    Attributes:
        row, column: names of the panel's row, such as a task, and of its column, such as a length.
        method: "dense" is drawn as a line; one that ends in "-own" as a hollow marker.
        density: share of the causal blocks, in 0 … 1.
        value: what the picture shows over it.
        interval: the value's confidence interval.
    """

    row: str
    column: str
    method: str
    density: float
    value: float
    interval: tuple[float, float]


def plot_trade_off(
    points: Sequence[TradeOffPoint],
    path: str | os.PathLike[str] | None = None,
    *,
    title: str,
    value_label: str,
    limits: tuple[float, float] | None = None,
    ax: Axes | Iterable[Axes] | None = None,
) -> list[Axes]:
    """Draws values against density: a panel for each row and column that has points, a line for each method.

    Args:
        points: At least one.
        path: The picture's file. Its suffix says which kind (``.png``). One that exists is replaced. None writes none.
        title: Stands above the panels of a new figure.
        value_label: What the values are.
        limits: Of the axis of values. None leaves them to matplotlib.
        ax: matplotlib Axes to draw in, one for each panel. None makes a new figure: without a path one of pyplot's, as
            notebooks show.

    Returns:
        The axes, row by row; ``axes[0].figure`` is the figure.

    Raises:
        TypeError, ValueError: An argument does not fit. The message names it.
        FlexPrefillError: matplotlib is not installed.
        OSError: The file cannot be written.
    """
    check_picture_path(path)
    if not points:
        raise ValueError("points must be at least one, got none")
    panels: dict[tuple[str, str], list[TradeOffPoint]] = {}
    for point in points:
        panels.setdefault((point.row, point.column), []).append(point)
    rows, columns, methods = (
        list(dict.fromkeys(getattr(point, name) for point in points)) for name in ("row", "column", "method")
    )
    places = sorted(panels, key=lambda panel: (rows.index(panel[0]), columns.index(panel[1])))
    if ax is None:
        drawn = _new_panels([(rows.index(row), columns.index(column)) for row, column in places], path)
    else:
        drawn = given_axes(ax, len(places))
    handles: dict[str, Any] = {}  # lines and error bars; the stub of legend knows only lines
    for axes, place in zip(drawn, places, strict=True):
        for method in methods:
            if of_method := [point for point in panels[place] if point.method == method]:
                handles[method] = _draw(axes, sorted(of_method, key=lambda point: point.density))
        axes.set_title(", ".join(filter(None, place)), fontsize=10, loc="left")
        axes.set_xlabel("% of the causal blocks kept", fontsize=10)
        axes.set_xlim(0, 103)
        if limits is not None:
            axes.set_ylim(*limits)
        if place[1] == columns[0]:
            axes.set_ylabel(value_label, fontsize=10)
        axes.grid(True, color=DROPPED, linewidth=0.8)
        axes.tick_params(labelsize=9, length=0, pad=5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#9aa3af")
    if ax is None:
        figure, across = figure_of(drawn[0]), min(len(handles), 3 * len(columns))
        top = 1 - 0.02 * PANEL_HEIGHT / (figure.get_size_inches()[1] * DPI)
        figure.suptitle(title, fontsize=11, x=drawn[0].get_position().x0, y=top, ha="left")
        figure.legend(handles.values(), handles, loc="lower center", ncols=across, frameon=False, fontsize=9)
    else:
        drawn[0].legend(handles.values(), handles, fontsize=9)
    save_figure(drawn[0], path)
    return drawn


def _new_panels(places: Sequence[tuple[int, int]], path: str | os.PathLike[str] | None) -> list[Axes]:
    """Axes at these rows and columns of a new figure."""
    rows, columns = (1 + max(place[side] for place in places) for side in (0, 1))
    width = LEFT + columns * (PANEL_WIDTH + GAP) - GAP + RIGHT
    height = TOP + rows * (PANEL_HEIGHT + ROW_GAP) - ROW_GAP + BOTTOM
    figure = new_figure(width, height, path)
    return [
        add_axes(
            figure,
            LEFT + column * (PANEL_WIDTH + GAP),
            BOTTOM + (rows - 1 - row) * (PANEL_HEIGHT + ROW_GAP),
            PANEL_WIDTH,
            PANEL_HEIGHT,
        )
        for row, column in places
    ]


def _draw(axes: Axes, own: Sequence[TradeOffPoint]) -> Any:
    """One method's points of a panel, by density; returns what its name in the legend stands beside."""
    method = own[0].method
    if method == "dense":
        low, high = own[0].interval
        axes.axhspan(low, high, color=DROPPED, zorder=0)
        return axes.axhline(own[0].value, color="#565656", linestyle="--", linewidth=1.3)
    colour, marker = LOOKS.get(method.removesuffix("-own"), OTHERS)
    style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.5}
    if method.endswith("-own"):
        style |= {"markerfacecolor": "white", "markersize": 6, "linestyle": "none"}
    middle = [point.value for point in own]
    around = [[p.value - p.interval[0] for p in own], [p.interval[1] - p.value for p in own]]
    shares = [100 * point.density for point in own]
    return axes.errorbar(shares, middle, yerr=around, capsize=2, elinewidth=0.7, **style)
