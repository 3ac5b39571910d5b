"""What each head of a map keeps, in a few numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flexprefill.blockmap.geometry import visible_blocks
from flexprefill.blockmap.map import BlockMap, check_has_bits
from flexprefill.config import PrefillConfig
from flexprefill.inspection.patterns import PATTERNS, block_patterns


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
    def shares(self) -> dict[str, float]:
        """Each pattern's share of the kept blocks; all 0 if none is kept."""
        return {name: blocks / max(1, self.kept) for name, blocks in self.patterns.items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, ready for JSON."""
        return {
            "batch": self.batch,
            "head": self.head,
            "density": self.density,
            "kept": self.kept,
            "visible": self.visible,
            "patterns": self.patterns,
            "shares": self.shares,
            "counts": self.counts.tolist(),
        }


def summarize_heads(block_map: BlockMap, *, config: PrefillConfig | None = None) -> list[HeadSummary]:
    """Density, counts by query block and patterns of each head, batch entry by batch entry.

    Works through one head at a time, on the map's device; :func:`block_patterns` has the patterns' rule.

    Args:
        block_map: [B, H, M, N].
        config: the settings that made the map, if they are known.

    Raises:
        TypeError: ``block_map`` or ``config`` is of another kind.
    """
    check_has_bits("block_map", block_map)
    visible = int(visible_blocks(block_map.geometry, "cpu").sum())
    counts = block_map.counts().cpu()
    summaries = []
    for batch in range(block_map.shape[0]):
        for head in range(block_map.shape[1]):
            codes = block_patterns(block_map, head, batch=batch, config=config)
            patterns = {name: int((codes == code).count_nonzero()) for code, name in enumerate(PATTERNS, 1)}
            summaries.append(HeadSummary(batch, head, visible, counts[batch, head], patterns))
    return summaries
