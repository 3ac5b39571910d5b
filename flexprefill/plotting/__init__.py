"""Pictures of maps, times and what methods lose. matplotlib is optional, and imported only when something is drawn."""

from flexprefill.plotting.canvas import token_label
from flexprefill.plotting.difference import plot_difference
from flexprefill.plotting.heads import plot_heads
from flexprefill.plotting.layers import plot_layers
from flexprefill.plotting.times import TimeLine, plot_times
from flexprefill.plotting.trade_off import TradeOffPoint, plot_trade_off

__all__ = [
    "TimeLine",
    "TradeOffPoint",
    "plot_difference",
    "plot_heads",
    "plot_layers",
    "plot_times",
    "plot_trade_off",
    "token_label",
]
