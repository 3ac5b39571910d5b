"""Maps as cells: how many blocks make one cell, and what share of them it keeps. Needs no matplotlib."""

from __future__ import annotations

import torch
from torch import Tensor

from flexprefill.blockmap.bits import unpack_bits
from flexprefill.blockmap.geometry import Geometry, causal_blocks, ceil_div


def cell_factor(geometry: Geometry, max_cells: int) -> int:
    """How many blocks a cell's side covers if the map's longer side has at most ``max_cells`` cells."""
    return ceil_div(max(geometry.rows, geometry.columns), max_cells)


def head_shares(words: Tensor, geometry: Geometry, factor: int) -> Tensor:
    """`kept_shares` of one head's words [M, W], on the CPU."""
    return kept_shares(unpack_bits(words.cpu(), geometry.columns), causal_blocks(geometry, "cpu"), factor)


def kept_shares(kept: Tensor, causal: Tensor, factor: int) -> Tensor:
    """The kept share of the causal blocks in each cell of factor × factor blocks.

    Args:
        kept: The kept blocks, bool [M, N].
        causal: The causally visible blocks, bool [M, N].
        factor: Blocks along a cell's side.

    Returns:
        float32 [ceil(M / factor), ceil(N / factor)], NaN where a cell has no causal block.
    """
    return _cell_sums(kept & causal, factor) / _cell_sums(causal, factor)


def shade(shares: Tensor) -> Tensor:
    """How far a cell's colour is from "nothing" to "all". It is the root, so one kept block of many is seen."""
    return shares.sqrt()


def _cell_sums(blocks: Tensor, factor: int) -> Tensor:
    rows, columns = blocks.shape
    padded = torch.nn.functional.pad(blocks, (0, -columns % factor, 0, -rows % factor))
    return padded.unflatten(1, (-1, factor)).unflatten(0, (-1, factor)).sum((1, 3), dtype=torch.int32).float()
