"""Which pattern each kept block belongs to: sinks, window, last rows, verticals, slashes, scattered blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from flexprefill.blockmap.bits import unpack_bits
from flexprefill.blockmap.geometry import visible_blocks
from flexprefill.blockmap.map import BlockMap, check_has_bits, check_index
from flexprefill.config import PrefillConfig, check_config

PATTERNS = ("sink", "window", "last", "vertical", "slash", "scattered")  # of the codes 1 … 6
SINK, WINDOW, LAST, VERTICAL, SLASH, SCATTERED = range(1, len(PATTERNS) + 1)
LINE_SHARE = 0.5  # of a column's or a diagonal's free blocks; what keeps fewer is no line
MIN_LINE_BLOCKS = 8  # free blocks; on a shorter column or diagonal a few blocks are half of it by chance
SLAB_ROWS = 512  # query blocks at a time where blocks take four bytes


def block_patterns(block_map: BlockMap, head: int, *, batch: int = 0, config: PrefillConfig | None = None) -> Tensor:
    """The pattern of each block of one head, by a fixed rule.

    A kept block (I, J) is of the first of these that holds; the names are in ``PATTERNS``.

    1. sink: J < ``sink_blocks``.
    2. window: J is at distance 0 … ``window_blocks - 1`` from the last key block that I sees.
    3. last: I is one of the last ``last_full_blocks`` query blocks and keeps every block that it sees.

    All other causally visible blocks, kept or not, are free. A line is a key block's column, or a diagonal of
    equal I - J, that has at least 8 free blocks and keeps at least half of them.

    4. vertical: J's column is a line, and the share it keeps is at least that of (I, J)'s diagonal.
    5. slash: (I, J)'s diagonal is a line; its share is then the larger one or its column is no line.
    6. scattered: every other.

    Args:
        block_map: [B, H, M, N].
        head, batch: which head of which batch entry.
        config: the settings that made the map. None: the default ``sink_blocks`` and ``window_blocks``, and no
            block is of the pattern last.

    Returns:
        uint8 [M, N] on the map's device: 0 for a block that is not kept, else 1 + its place in ``PATTERNS``.

    Raises:
        TypeError: ``block_map`` or ``config`` is of another kind, ``head`` or ``batch`` no int.
        ValueError: the map has no such head or batch entry.
    """
    check_has_bits("block_map", block_map)
    for name, index, size in (("batch", batch, block_map.shape[0]), ("head", head, block_map.shape[1])):
        check_index(name, index, size)
    if config is None:
        config = PrefillConfig(last_full_blocks=0)
    check_config(config)

    rows, columns = block_map.shape[2:]
    visible = visible_blocks(block_map.geometry, block_map.device)
    words = block_map.words[batch, head]
    kept = torch.cat([unpack_bits(part, columns) for part in words.split(SLAB_ROWS)])
    column = torch.arange(columns, device=kept.device, dtype=torch.int32)
    last = kept.sum(1, dtype=torch.int32) == visible
    last[: max(0, rows - config.last_full_blocks)] = False
    sink = min(config.sink_blocks, columns)
    window_start = (visible - config.window_blocks).clamp(min=sink)
    free_end = window_start.masked_fill(last, sink)  # row I's free blocks are sink … free_end[I] - 1
    free = kept & (column < free_end[:, None])
    free[:, :sink] = False

    column_length, diagonal_length = _free_lengths(sink, free_end, columns)
    of_column = _line_shares(free.sum(0, dtype=torch.int32), column_length)
    of_diagonal = _line_shares(_diagonal_sums(free), diagonal_length)
    # row I's diagonals are M - 1 - I … M - 1 - I + N - 1
    diagonal_wins = (of_diagonal.unfold(0, columns, 1) > of_column).flip(0)

    patterns = kept * torch.where(last, LAST, SCATTERED).to(torch.uint8)[:, None]
    patterns.masked_fill_(free & (of_column > 0), VERTICAL)
    patterns.masked_fill_(free & diagonal_wins, SLASH)
    patterns.masked_fill_(kept & (column >= window_start[:, None]), WINDOW)
    patterns[:, :sink] = kept[:, :sink] * SINK
    return patterns


def _free_lengths(start: int, end: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """How many free blocks each column and each diagonal has, of rows that are free from start to end - 1: int64.

    Diagonal M - 1 - I + J is block (I, J)'s: [N] and [M + N - 1].
    """
    rows = end.shape[0]
    first = torch.arange(rows - 1, -1, -1, device=end.device)  # the diagonal of each row's column 0
    return (
        _cover(torch.full_like(first, start), end, columns),
        _cover(first + start, first + end, rows + columns - 1),
    )


def _cover(starts: Tensor, ends: Tensor, size: int) -> Tensor:
    """How many of the ranges start … end - 1 hold each of 0 … size - 1: int64 [size]."""
    steps = torch.bincount(starts, minlength=size + 1) - torch.bincount(ends, minlength=size + 1)
    return steps.cumsum(0)[:size]


def _diagonal_sums(blocks: Tensor) -> Tensor:
    """How many of the blocks bool [M, N] are set on each diagonal M - 1 - I + J: int64 [M + N - 1]."""
    rows, columns = blocks.shape
    sums = torch.zeros(rows + columns - 1, dtype=torch.int64, device=blocks.device)
    for start in range(0, rows, SLAB_ROWS):
        part = blocks[start : start + SLAB_ROWS].flip(0)
        height = part.shape[0]
        # rows of one element less than they are written in: each row then begins one element later than the one before
        skewed = torch.zeros(height, height + columns, device=blocks.device)
        skewed[:, :columns] = part
        width = height + columns - 1
        first = rows - start - height
        sums[first : first + width] += skewed.flatten()[: height * width].view(height, width).sum(0).long()
    return sums


def _line_shares(kept: Tensor, length: Tensor) -> Tensor:
    """The kept share of each line, 0 for what is none: float64, in which equal fractions are equal numbers."""
    share = kept.double() / length.clamp(min=1)
    return share.masked_fill((share < LINE_SHARE) | (length < MIN_LINE_BLOCKS), 0)
