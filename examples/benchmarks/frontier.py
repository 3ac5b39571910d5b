"""Draws what methods lose against the time of a whole call: search and attention.

    python examples/benchmarks/frontier.py EVAL.json TIMES.json PICTURE.png

EVAL.json is of `flexprefill eval` with a pretrained model, TIMES.json of examples/benchmarks/two_sided.py. A method's
time is that of its search and of the attention at its density, on a line through the densities that were timed.
Methods without a kernel of their own count without their search: they are drawn hollow, and would be slower.
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
from matplotlib import pyplot

from flexprefill.evaluation.comparison import Cell
from flexprefill.evaluation.report import loss_points
from flexprefill.plotting.canvas import token_label
from flexprefill.plotting.trade_off import LOOKS, OTHERS

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name in ("evaluation", "times", "picture"):
    parser.add_argument(name, type=Path, nargs="+" if name == "evaluation" else None)
arguments = parser.parse_args()
SEARCHES = {"flashprefill": "FlashPrefill's search", "two-sided": "two-sided search"}

# of a cell that several files have, the last one counts
cells = {}
for path in arguments.evaluation:
    for cell in (Cell(**values) for values in json.loads(path.read_text())["cells"]):
        cells[cell.task, cell.length, cell.method] = cell
timed = json.loads(arguments.times.read_text())["by_length"]
points = loss_points(list(cells.values()))


def medians(column):
    """Of the times at the length that a panel's column names."""
    length = next(length for length in timed if column == f"{token_label(int(length))} tokens")
    return {name: statistics.median(repeats) for name, repeats in timed[length]["times_ms"].items()}


def milliseconds(point):
    """Of the whole call at the point's length and density."""
    took = medians(point.column)
    attention = sorted((float(name.split()[-1]), ms) for name, ms in took.items() if name.startswith("attention at"))
    kept, ms = zip(*attention, strict=True)
    # the time grows evenly with the blocks
    slope, at_none = np.polyfit(kept, ms, 1)
    return took.get(SEARCHES.get(point.method, ""), 0.0) + float(at_none + slope * point.density)


panels = list(dict.fromkeys((point.row, point.column) for point in points))
figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 4), squeeze=False)
for ax, panel in zip(axes[0], panels, strict=True):
    own = [point for point in points if (point.row, point.column) == panel]
    for method in dict.fromkeys(point.method for point in own):
        of_method = sorted((point for point in own if point.method == method), key=lambda point: point.density)
        if method == "dense":
            ax.plot(medians(panel[1])["dense attention"], 0, "k*", markersize=9, label="dense")
            continue
        colour, marker = LOOKS.get(method.removesuffix("-own"), OTHERS)
        ax.plot(
            [milliseconds(point) for point in of_method], [point.value for point in of_method], color=colour,
            marker=marker, markersize=5, label=method, fillstyle="full" if method in SEARCHES else "none",
        )  # fmt: skip
    ax.set_title(", ".join(panel), fontsize=10, loc="left")
    ax.set_xlabel("ms of search and attention, one layer", fontsize=9)
    ax.grid(True, color="#e5e7eb")
axes[0][0].set_ylabel("loss over dense, nats a token", fontsize=9)
axes[0][-1].legend(fontsize=8)
figure.tight_layout()
figure.savefig(arguments.picture, dpi=120)
