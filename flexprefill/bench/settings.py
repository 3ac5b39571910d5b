"""What a benchmark measures, and its defaults."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flexprefill.config import PrefillConfig

# by device: densities by length in tokens; those of CUDA follow FlashPrefill's published runs
DENSITIES: dict[str, dict[int, float]] = {
    "cuda": {4096: 0.46, 8192: 0.25, 16384: 0.13, 32768: 0.068, 65536: 0.04, 131072: 0.025, 262144: 0.017},
    "cpu": {1024: 0.1, 2048: 0.1, 4096: 0.1, 8192: 0.1},
}
# on the CPU the config's default sinks, window and last blocks would keep more than a tenth at all of these lengths
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "dtype": torch.bfloat16,
        "sink_blocks": PrefillConfig.sink_blocks,
        "window_blocks": PrefillConfig.window_blocks,
        "last_full_blocks": PrefillConfig.last_full_blocks,
    },
    "cpu": {
        "heads": 4,
        "kv_heads": 4,
        "head_dim": 64,
        "dtype": torch.float32,
        "sink_blocks": 1,
        "window_blocks": 1,
        "last_full_blocks": 0,
    },
}


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        lengths: In tokens.
        densities: One for each length, in (0, 1].
        heads: Query heads.
        kv_heads: Key heads.
        head_dim: The head dimension.
        dtype: The tensors' dtype.
        rule: The settings of the search. Its alpha is not used.
        repeats: Repeats of each contestant at each length. Slow contestants get fewer.
        device: Where to measure.
        only: Names of contestants, keys of CONTESTANTS for the device.
        eager: Whether the host's time counts too on CUDA, at every length.
    """

    lengths: Sequence[int]
    densities: Sequence[float]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    rule: PrefillConfig
    repeats: int
    device: torch.device
    only: Sequence[str]
    eager: bool = False


def default_density(device_type: str, length: int) -> float:
    """The density for a length: log-log interpolation between the known ones, and beyond them the nearest."""
    known = DENSITIES[device_type]
    length = min(max(length, min(known)), max(known))
    below = max(other for other in known if other <= length)
    above = min(other for other in known if other >= length)
    if below == above:
        return known[below]
    part = math.log(length / below) / math.log(above / below)
    return known[below] * (known[above] / known[below]) ** part
