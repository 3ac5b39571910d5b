"""The settings of the rule as the implementations read them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flexprefill.config import PrefillConfig
from flexprefill.runtime.state import remembered


class Rule(NamedTuple):
    """A PrefillConfig for one call, with its threshold in log2. Numbers and names only."""

    scale: float
    log2_alpha: float  # the least one where heads have their own
    block_size: int
    sink_blocks: int
    window_blocks: int
    last_full_blocks: int  # 0 if a later chunk follows
    min_blocks: int
    kv_masks: bool  # one mask for the query heads of a key head
    first_key: bool  # a row scores every block whose first key it sees, not only those that it sees whole
    scorer: str
    log2_alphas: tuple[float, ...] = ()  # one for each query head; empty if all have log2_alpha
    probe_rows: int = 0
    probe_share: float = 0.0
    outlier_keys: int = 0
    outlier_share: float = 0.0

    @property
    def two_sided(self) -> bool:
        """Whether probes or outliers look for blocks too."""
        return bool(self.probe_rows or self.outlier_keys)

    @property
    def scores_means(self) -> bool:
        """Whether blocks are scored by their means."""
        return self.log2_alpha < math.inf

    @classmethod
    def of(cls, config: PrefillConfig, *, scale: float, last_chunk: bool) -> Rule:
        return cls(
            scale,
            min(config.log2_alphas),
            config.block_size,
            config.sink_blocks,
            config.window_blocks,
            config.last_full_blocks if last_chunk else 0,
            config.min_blocks,
            config.mask_heads == "kv",
            config.score_rows == "visible",
            config.scorer,
            config.log2_alphas if isinstance(config.alpha, tuple) else (),
            config.probe_rows,
            config.probe_share,
            config.outlier_keys,
            config.outlier_share,
        )


class Sampling(NamedTuple):
    """Which rows of each head the guard looks at, and what they have to show."""

    rows: int  # samples are taken from this many first queries
    samples: int
    guard: float  # the recall asked for
    margin: float  # standard errors that are taken off the mean
    kv_masks: bool  # the query heads of a key head are widened together


def log2_alphas_on(device: torch.device, rule: Rule) -> Tensor:
    """A rule's log2_alphas on a device, float32 [Hq]. Nothing waits. A captured CUDA graph copies them anew."""
    return _log2_alphas(rule.log2_alphas, device.type == "cuda").to(device, non_blocking=True)


@remembered("alphas of heads on the host", most=256)
def _log2_alphas(numbers: tuple[float, ...], pinned: bool) -> Tensor:
    # the caller may have another default dtype and device
    return torch.tensor(numbers, dtype=torch.float32, device="cpu", pin_memory=pinned)
