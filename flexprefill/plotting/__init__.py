"""Pictures of maps, times and accuracies. matplotlib is optional, and imported only when something is drawn."""

from flexprefill.plotting.accuracy import AccuracyPoint, plot_accuracy
from flexprefill.plotting.canvas import token_label
from flexprefill.plotting.difference import plot_difference
from flexprefill.plotting.heads import plot_heads
from flexprefill.plotting.layers import plot_layers
from flexprefill.plotting.times import TimeLine, plot_times

__all__ = [
    "AccuracyPoint",
    "TimeLine",
    "plot_accuracy",
    "plot_difference",
    "plot_heads",
    "plot_layers",
    "plot_times",
    "token_label",
]
