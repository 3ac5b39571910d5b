"""Pictures of times against lengths."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexprefill.blockmap.html import DROPPED, KEPT
from flexprefill.plotting.canvas import (
    DPI,
    add_axes,
    check_picture_path,
    given_axes,
    new_figure,
    save_figure,
    token_label,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# pixels of a picture of times: the whole, the margins around the axes, and from one label to the next
TIMES_WIDTH, TIMES_HEIGHT = 1900, 1240
TIMES_LEFT, TIMES_RIGHT, TIMES_TOP, TIMES_BOTTOM = 180, 520, 140, 150
LABEL_STEP = 42
PART_COLOURS = ("#1b9e77", "#d95f02", "#7570b3", "#a6761d", "#e7298a", "#4d9221")
WHOLE_DASHES = ((0, (1, 1)), (0, (3, 1, 1, 1)))
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


def plot_times(
    lines: Sequence[TimeLine], path: str | os.PathLike[str] | None = None, *, title: str, ax: Axes | None = None
) -> Axes:
    """Draws times against lengths, both axes logarithmic; each line's name stands at its right end.

    Parts are thin and coloured, wholes thick and blue, all but the first dotted, dense attention grey and dashed.

    Args:
        lines: at least one.
        path: the picture's file; its suffix says which kind (``.png``). One that exists is replaced. None writes none.
        title: stands above the axes.
        ax: matplotlib Axes to draw in. None makes a new figure: without a path one of pyplot's, as notebooks show.

    Returns:
        The axes; ``axes.figure`` is the figure.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        FlexPrefillError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    check_picture_path(path)
    if not lines or not all(line.times for line in lines):
        raise ValueError(f"lines must be at least one, each with a time, got {lines!r}")
    if ax is None:
        width, height = TIMES_WIDTH - TIMES_LEFT - TIMES_RIGHT, TIMES_HEIGHT - TIMES_TOP - TIMES_BOTTOM
        axes = add_axes(new_figure(TIMES_WIDTH, TIMES_HEIGHT, path), TIMES_LEFT, TIMES_BOTTOM, width, height)
    else:
        (axes,) = given_axes(ax, 1)
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
    _label_ends(axes, lines, [look["color"] for look in looks])
    save_figure(axes, path)
    return axes


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


def _looks(lines: Sequence[TimeLine]) -> list[dict[str, Any]]:
    """How matplotlib is to draw each line."""
    parts, dense = itertools.cycle(PART_COLOURS), itertools.cycle(zip(DENSE_COLOURS, DENSE_DASHES, strict=True))
    wholes = itertools.chain(["solid"], itertools.cycle(WHOLE_DASHES))
    looks: list[dict[str, Any]] = []
    for line in lines:
        if line.kind == "whole":
            look = {"color": KEPT, "linewidth": 2.8, "marker": "o", "markersize": 5, "zorder": 4}
            looks.append(look | {"linestyle": next(wholes)})
        elif line.kind == "part":
            looks.append({"color": next(parts), "linewidth": 1.3, "marker": "o", "markersize": 3, "zorder": 3})
        else:
            colour, dash = next(dense)
            looks.append({"color": colour, "linewidth": 1.5, "linestyle": dash, "marker": "s", "markersize": 3})
    return looks


def _label_ends(axes: Axes, lines: Sequence[TimeLine], colours: Sequence[str]) -> None:
    """Each line's name right of the axes, moved apart where ends are close, with a thin line from its end."""
    axes.autoscale_view()  # which is otherwise put off until the picture is drawn
    ends = [(max(line.times), line.times[max(line.times)]) for line in lines]
    pixels = [axes.transData.transform(end) for end in ends]
    left, bottom = axes.transAxes.transform((0, 0))
    right = axes.transAxes.transform((1, 0))[0]
    height, step = axes.bbox.height, LABEL_STEP * axes.figure.dpi / DPI
    places = spread([y - bottom for _, y in pixels], step, 0, height)
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
