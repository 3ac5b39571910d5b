"""What each head of a map keeps, in a few numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexprefill.blockmap.geometry import visible_blocks
from flexprefill.blockmap.map import BlockMap
from flexprefill.config import PrefillConfig
from flexprefill.inspection.patterns import PATTERNS, as_lanes, count_patterns


@dataclass(frozen=True, eq=False)
class HeadSummary:
    """One head of one batch entry.

    Attributes:
        batch, head: which.
        visible: its causally visible blocks.
        counts: how many key blocks each query block keeps, int32 [M] on the CPU.
        patterns: kept blocks by pattern, in the order of ``PATTERNS``; they add up to :attr:`kept`.
    """

    batch: int
    head: int
    visible: int
    counts: Tensor
    patterns: dict[str, int]

    @property
    def kept(self) -> int:
        """Kept blocks."""
        return sum(self.patterns.values())

    @property
    def density(self) -> float:
        """The kept share of the visible blocks."""
        return self.kept / self.visible

    @property
    def dense(self) -> bool:
        """Whether it keeps every visible block; by the rule most of these are of some pattern too, often verticals."""
        return self.kept == self.visible

    @property
    def shares(self) -> dict[str, float]:
        """Each pattern's share of the kept blocks; all 0 if none is kept."""
        return {name: blocks / max(1, self.kept) for name, blocks in self.patterns.items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, ready for JSON."""
        return {
            "batch": self.batch,
            "head": self.head,
            "density": self.density,
            "dense": self.dense,
            "kept": self.kept,
            "visible": self.visible,
            "patterns": self.patterns,
            "shares": self.shares,
            "counts": self.counts.tolist(),
        }


def summarize_heads(block_map: BlockMap, *, config: PrefillConfig | None = None) -> list[HeadSummary]:
    """Density, counts by query block and patterns of each head, batch entry by batch entry.

    It counts on the CPU; :func:`block_patterns` has the patterns' rule.

    Args:
        block_map: [B, H, M, N].
        config: the settings that made the map, if they are known.

    Raises:
        TypeError: ``block_map`` or ``config`` is of another kind.
    """
    patterns = count_patterns(block_map, config=config).tolist()
    visible = int(visible_blocks(block_map.geometry, "cpu").sum())
    # in NumPy: torch's own threads cost more than they give here
    counts = torch.from_numpy(np.bitwise_count(as_lanes(block_map)).sum(3, dtype=np.int32))
    return [
        HeadSummary(batch, head, visible, counts[batch, head], dict(zip(PATTERNS, patterns[batch][head], strict=True)))
        for batch in range(block_map.shape[0])
        for head in range(block_map.shape[1])
    ]
