"""Bits of words in Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def bits_below(column, w):
    """The bits of words w that stand for blocks before ``column``."""
    below = tl.minimum(tl.maximum(column - w * 32, 0), 32)
    return tl.where(below == 32, -1, (1 << (below & 31)) - 1)
