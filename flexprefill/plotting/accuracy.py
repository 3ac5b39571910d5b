"""Pictures of accuracy against density."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexprefill.blockmap.html import DROPPED, KEPT
from flexprefill.plotting.canvas import add_axes, check_picture_path, given_axes, new_figure, save_figure, token_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# pixels: of a panel, and around it
PANEL_WIDTH, PANEL_HEIGHT = 640, 640
ACCURACY_LEFT, ACCURACY_RIGHT, ACCURACY_TOP, ACCURACY_BOTTOM, ACCURACY_GAP = 170, 60, 150, 260, 60
LOOKS = {  # of methods by name: colour and marker
    "flashprefill": (KEPT, "o"),
    "mean-correction": ("#1b9e77", "s"),
    "exact": ("#2b2b2b", "^"),
    "xattention": ("#d95f02", "D"),
    "random": ("#7570b3", "v"),
}
OTHERS = ("#a6761d", "P")


@dataclass(frozen=True)
class AccuracyPoint:
    """One method at one density.

    Attributes:
        length: of the prompts in tokens.
        method: "dense" is drawn as a line.
        density, accuracy: shares in 0 … 1.
        interval: the accuracy's confidence interval.
    """

    length: int
    method: str
    density: float
    accuracy: float
    interval: tuple[float, float]


def plot_accuracy(
    points: Sequence[AccuracyPoint],
    path: str | os.PathLike[str] | None = None,
    *,
    title: str,
    ax: Axes | Iterable[Axes] | None = None,
) -> list[Axes]:
    """Draws accuracy against density: a panel for each length, a line for each method.

    Args:
        points: at least one.
        path: the picture's file; its suffix says which kind (``.png``). One that exists is replaced. None writes none.
        title: stands above the panels of a new figure.
        ax: matplotlib Axes to draw in, one for each length. None makes a new figure: without a path one of pyplot's, as
            notebooks show.

    Returns:
        The axes, one for each length, ascending; ``axes[0].figure`` is the figure.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        FlexPrefillError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    check_picture_path(path)
    if not points:
        raise ValueError("points must be at least one, got none")
    lengths = sorted({point.length for point in points})
    methods = list(dict.fromkeys(point.method for point in points))
    panels = _new_panels(len(lengths), path) if ax is None else given_axes(ax, len(lengths))
    handles: dict[str, Any] = {}  # lines and error bars; the stub of legend knows only lines
    for axes, length in zip(panels, lengths, strict=True):
        for method in methods:
            own = sorted(
                (point for point in points if (point.length, point.method) == (length, method)),
                key=lambda point: point.density,
            )
            if not own:
                continue
            if method == "dense":
                low, high = own[0].interval
                axes.axhspan(100 * low, 100 * high, color=DROPPED, zorder=0)
                handles[method] = axes.axhline(100 * own[0].accuracy, color="#565656", linestyle="--", linewidth=1.3)
                continue
            colour, marker = LOOKS.get(method, OTHERS)
            middle = [100 * point.accuracy for point in own]
            around = [
                [m - 100 * point.interval[0] for m, point in zip(middle, own, strict=True)],
                [100 * point.interval[1] - m for m, point in zip(middle, own, strict=True)],
            ]
            shares = [100 * point.density for point in own]
            style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.5}
            handles[method] = axes.errorbar(shares, middle, yerr=around, capsize=2, elinewidth=0.7, **style)
        axes.set_title(f"{token_label(length)} tokens", fontsize=10, loc="left")
        axes.set_xlabel("% of the causal blocks kept", fontsize=10)
        axes.set_xlim(0, 103)
        axes.set_ylim(-3, 103)
        axes.grid(True, color=DROPPED, linewidth=0.8)
        axes.tick_params(labelsize=9, length=0, pad=5, labelleft=axes is panels[0])
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#9aa3af")
    panels[0].set_ylabel("% exact answers, mean of the tasks", fontsize=10)
    if ax is None:
        figure, columns = panels[0].figure, min(len(handles), 3 * len(lengths))
        figure.suptitle(title, fontsize=11, x=panels[0].get_position().x0, y=0.98, ha="left")
        figure.legend(handles.values(), handles, loc="lower center", ncols=columns, frameon=False, fontsize=9)
    else:
        panels[0].legend(handles.values(), handles, fontsize=9)
    save_figure(panels[0], path)
    return panels


def _new_panels(count: int, path: str | os.PathLike[str] | None) -> list[Axes]:
    """Axes beside each other in a new figure."""
    step = PANEL_WIDTH + ACCURACY_GAP
    width = ACCURACY_LEFT + count * step - ACCURACY_GAP + ACCURACY_RIGHT
    figure = new_figure(width, ACCURACY_TOP + PANEL_HEIGHT + ACCURACY_BOTTOM, path)
    lefts = [ACCURACY_LEFT + panel * step for panel in range(count)]
    return [add_axes(figure, left, ACCURACY_BOTTOM, PANEL_WIDTH, PANEL_HEIGHT) for left in lefts]
