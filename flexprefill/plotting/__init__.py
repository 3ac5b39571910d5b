"""Pictures of maps and of times. matplotlib is optional, and imported only when something is drawn."""

from flexprefill.blockmap.cells import kept_shares
from flexprefill.blockmap.html import DROPPED, KEPT
from flexprefill.plotting.accuracy import AccuracyPoint, plot_accuracy
from flexprefill.plotting.canvas import COLUMNS, GAP_X, LEFT, TOP, token_label, token_ticks
from flexprefill.plotting.difference import BOTH, ONLY_FIRST, ONLY_SECOND, plot_difference
from flexprefill.plotting.heads import plot_heads
from flexprefill.plotting.layers import plot_layers
from flexprefill.plotting.times import TimeLine, plot_times, spread

__all__ = [
    "BOTH",
    "COLUMNS",
    "DROPPED",
    "GAP_X",
    "KEPT",
    "LEFT",
    "ONLY_FIRST",
    "ONLY_SECOND",
    "TOP",
    "AccuracyPoint",
    "TimeLine",
    "kept_shares",
    "plot_accuracy",
    "plot_difference",
    "plot_heads",
    "plot_layers",
    "plot_times",
    "spread",
    "token_label",
    "token_ticks",
]
