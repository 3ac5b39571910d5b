"""Pictures of what methods lose against what they keep."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flexprefill.blockmap.html import DROPPED, KEPT
from flexprefill.plotting.canvas import add_axes, check_picture_path, new_figure

# pixels: of a panel, and around it
PANEL_WIDTH, PANEL_HEIGHT = 640, 640
LEFT, RIGHT, TOP, BOTTOM, GAP, ROW_GAP = 170, 60, 150, 260, 110, 190
LOOKS = {  # of methods by name: colour and marker
    "flashprefill": (KEPT, "o"),
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
    path: str | os.PathLike[str],
    *,
    title: str,
    value_label: str,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draws values against density into a file: a panel for each row and column, a line for each method.

    Args:
        points: at least one.
        path: the picture's file; its suffix says which kind (``.png``). One that exists is replaced.
        value_label: what the values are.
        limits: of the axis of values; None leaves them to matplotlib.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        FlexPrefillError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    check_picture_path(path)
    if not points:
        raise ValueError("points must be at least one, got none")
    rows, columns, methods = (
        list(dict.fromkeys(getattr(point, name) for point in points)) for name in ("row", "column", "method")
    )
    width = LEFT + len(columns) * (PANEL_WIDTH + GAP) - GAP + RIGHT
    height = TOP + len(rows) * (PANEL_HEIGHT + ROW_GAP) - ROW_GAP + BOTTOM
    figure = new_figure(width, height)
    handles: dict[str, Any] = {}  # lines and error bars; the stub of legend knows only lines
    for place, row in enumerate(rows):
        for panel, column in enumerate(columns):
            own = [point for point in points if (point.row, point.column) == (row, column)]
            if not own:
                continue
            bottom = BOTTOM + (len(rows) - 1 - place) * (PANEL_HEIGHT + ROW_GAP)
            axes = add_axes(figure, LEFT + panel * (PANEL_WIDTH + GAP), bottom, PANEL_WIDTH, PANEL_HEIGHT)
            for method in methods:
                of_method = [point for point in own if point.method == method]
                if of_method:
                    handles[method] = _draw(axes, sorted(of_method, key=lambda point: point.density))
            axes.set_title(", ".join(filter(None, (row, column))), fontsize=10, loc="left")
            axes.set_xlabel("% of the causal blocks kept", fontsize=10)
            axes.set_xlim(0, 103)
            if limits is not None:
                axes.set_ylim(*limits)
            axes.grid(True, color=DROPPED, linewidth=0.8)
            axes.tick_params(labelsize=9, length=0, pad=5)
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color("#9aa3af")
            if panel == 0:
                axes.set_ylabel(value_label, fontsize=10)
    figure.suptitle(title, fontsize=11, x=LEFT / width, y=1 - 0.02 * PANEL_HEIGHT / height, ha="left")
    figure.legend(
        handles.values(),
        handles,
        loc="lower center",
        ncols=min(len(handles), 3 * len(columns)),
        frameon=False,
        fontsize=9,
    )
    figure.savefig(path, facecolor="white")


def _draw(axes: Any, own: Sequence[TradeOffPoint]) -> Any:
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
