"""How two maps, or the heads of one, differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexprefill.blockmap.bits import popcount
from flexprefill.blockmap.map import BlockMap, check_has_bits
from flexprefill.inspection.patterns import Lanes, as_lanes


@dataclass(frozen=True, eq=False)
class MapDifference:
    """Where two maps of one shape differ, head by head.

    Attributes:
        both: blocks that both keep, int64 [B, H] on the CPU.
        only_first, only_second: blocks that only one of them keeps, as ``both``.
    """

    both: Tensor
    only_first: Tensor
    only_second: Tensor

    @property
    def equal(self) -> bool:
        """Whether both keep the same blocks."""
        return not (self.only_first.any() or self.only_second.any())

    @property
    def iou(self) -> Tensor:
        """Intersection over union: float64 [B, H], 1 where neither keeps a block."""
        return _iou(self.both, self.both + self.only_first + self.only_second)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, ready for JSON."""
        iou = self.iou
        return {
            "equal": self.equal,
            "heads": [
                {
                    "batch": batch,
                    "head": head,
                    "iou": float(iou[batch, head]),
                    "both": int(self.both[batch, head]),
                    "only_first": int(self.only_first[batch, head]),
                    "only_second": int(self.only_second[batch, head]),
                }
                for batch in range(iou.shape[0])
                for head in range(iou.shape[1])
            ],
        }


def compare_maps(first: BlockMap, second: BlockMap) -> MapDifference:
    """Counts the blocks that both maps keep, and those that only one keeps.

    Raises:
        TypeError: one is no BlockMap.
        ValueError: they differ in shape, lengths, block size or device.
    """
    _check_maps(first, second)
    both, ours, theirs = (_totals(_countable(block_map)).cpu() for block_map in (first & second, first, second))
    return MapDifference(both, ours - both, theirs - both)


def head_similarity(first: BlockMap, second: BlockMap | None = None) -> Tensor:
    """Intersection over union of every head of one map with every head of another, within each batch entry.

    Args:
        first: [B, H, M, N].
        second: [B, H2, M, N] of the same lengths, such as another layer's; None for ``first`` itself.

    Returns:
        float64 [B, H, H2] on the CPU; 1 where neither head keeps a block.

    Raises:
        TypeError: one is no BlockMap.
        ValueError: they differ in batch, lengths, block size or device.
    """
    if second is None:
        second = first
    _check_maps(first, second)
    for name, ours, theirs in (
        ("batch", first.shape[0], second.shape[0]),
        ("q_len", first.q_len, second.q_len),
        ("kv_len", first.kv_len, second.kv_len),
        ("block_size", first.block_size, second.block_size),
        ("device", first.device, second.device),
    ):
        if ours != theirs:
            raise ValueError(f"second must have first's {name} {ours}, got {theirs}")
    symmetric = second is first
    heads, others = first.shape[1], second.shape[1]
    both = torch.zeros(first.shape[0], heads, others, dtype=torch.int64, device=first.device)
    words, other_words = _countable(first), _countable(second)
    for head in range(heads):
        start = head if symmetric else 0
        shared = _totals(words[:, head, None] & other_words[:, start:])
        both[:, head, start:] = shared
        if symmetric:
            both[:, start:, head] = shared
    union = _totals(words)[:, :, None] + _totals(other_words)[:, None] - both
    return _iou(both, union).cpu()


def _check_maps(first: BlockMap, second: BlockMap) -> None:
    for name, block_map in (("first", first), ("second", second)):
        check_has_bits(name, block_map)


def _countable(block_map: BlockMap) -> Tensor | Lanes:
    """A map's words as they are counted fastest: in NumPy on the CPU, where torch's threads cost more than they do."""
    return as_lanes(block_map) if block_map.device.type == "cpu" else block_map.words


def _totals(words: Tensor | Lanes) -> Tensor:
    """Set bits of each head: int64 [B, H] of [B, H, M, W]."""
    if not isinstance(words, Tensor):
        return torch.from_numpy(np.bitwise_count(words).sum((-1, -2), dtype=np.int64))
    # head by head, since a popcount needs a few copies
    return torch.stack([popcount(head).sum((-1, -2), dtype=torch.int64) for head in words.unbind(1)], 1)


def _iou(both: Tensor, union: Tensor) -> Tensor:
    return torch.where(union > 0, both.double() / union.clamp(min=1), 1.0)
