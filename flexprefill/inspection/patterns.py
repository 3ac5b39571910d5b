"""Which pattern each kept block belongs to: sinks, window, last rows, verticals, slashes, scattered blocks."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexprefill.blockmap.bits import unpack_bits
from flexprefill.blockmap.geometry import Geometry, visible_blocks
from flexprefill.blockmap.map import BlockMap, check_has_bits, check_index
from flexprefill.config import PrefillConfig, check_config

PATTERNS = ("sink", "window", "last", "vertical", "slash", "scattered")  # of the codes 1 … 6
SINK, WINDOW, LAST, VERTICAL, SLASH, SCATTERED = range(1, len(PATTERNS) + 1)
LINE_SHARE = 0.5  # of a column's or a diagonal's free blocks; what keeps fewer is no line
MIN_LINE_BLOCKS = 8  # free blocks; on a shorter column or diagonal a few blocks are half of it by chance
SLAB_ROWS = 512  # query blocks at a time where blocks take four bytes
LANES = 64  # blocks of a word here, and query blocks that are counted together
WORDS_AT_A_TIME = 2**17  # of heads together; a megabyte stays in the cache

Lanes = NDArray[np.uint64]
Numbers = NDArray[np.int64]
Shares = NDArray[np.float64]


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
    config = known_settings(config)

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


def known_settings(config: PrefillConfig | None) -> PrefillConfig:
    """The settings that made a map; where they are not known, the default sinks and window and no last rows."""
    if config is None:
        return PrefillConfig(last_full_blocks=0)
    check_config(config)
    return config


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


def count_patterns(block_map: BlockMap, *, config: PrefillConfig | None = None) -> Tensor:
    """How many blocks of each pattern each head keeps, by the rule of :func:`block_patterns`.

    It counts bits of words on the CPU, some heads at a time, where ``block_patterns`` names block after block.

    Args:
        block_map, config: as there.

    Returns:
        int64 [B, H, 6] on the CPU, in the order of ``PATTERNS``.

    Raises:
        TypeError, ValueError: ``block_map`` has no bits, or ``config`` is of another kind.
    """
    check_has_bits("block_map", block_map)
    config = known_settings(config)
    words = as_lanes(block_map)
    heads = words.reshape(-1, *words.shape[2:])
    layout = _Layout(block_map.geometry, config)
    step = max(1, WORDS_AT_A_TIME // heads[0].size)
    counts = [layout.count(heads[first : first + step]) for first in range(0, len(heads), step)]
    return torch.from_numpy(np.concatenate(counts).reshape(*words.shape[:2], len(PATTERNS)))


def as_lanes(block_map: BlockMap) -> Lanes:
    """A map's words two by two: [B, H, M, ⌈W / 2⌉], of which bit j of word w is key block 64 w + j."""
    words = block_map.words.to("cpu").numpy()
    if words.shape[3] % 2:
        words = np.pad(words, ((0, 0), (0, 0), (0, 0), (0, 1)))
    return np.ascontiguousarray(words).view(np.uint64)


class _Layout:
    """Where the patterns of maps of one geometry lie, and the counting of some of their heads."""

    def __init__(self, geometry: Geometry, config: PrefillConfig) -> None:
        self._rows, self._columns = geometry.rows, geometry.columns
        self._visible = visible_blocks(geometry, "cpu").numpy().astype(np.int64)
        self._sink = min(config.sink_blocks, self._columns)
        self._first_last = max(0, self._rows - config.last_full_blocks)
        self._window_start = (self._visible - config.window_blocks).clip(min=self._sink)
        self._is_sink = _low_bits(np.array([self._sink]), self._columns)
        self._before_window = _low_bits(self._window_start, self._columns)  # [M, V]

    def count(self, words: Lanes) -> Numbers:
        """[K, M, V] to [K, 6]."""
        last = np.bitwise_count(words).sum(2, dtype=np.int64) == self._visible
        last[:, : self._first_last] = False
        sinks = _bits_in(words & self._is_sink)
        windows = _bits_in(words & ~self._before_window)
        middle = words & self._before_window & ~self._is_sink
        free = middle * ~last[:, :, None]
        lasts = _bits_in(middle) - _bits_in(free)

        of_column, of_diagonal = self._line_sums(free)
        column_length, diagonal_length = self._line_lengths(last)
        column_share = _shares(of_column, column_length)
        diagonal_share = _shares(of_diagonal, diagonal_length)
        vertical = (of_column * (column_share > 0)).sum(1)
        slash = (of_diagonal * (diagonal_share > 0)).sum(1)
        # blocks that a column and a diagonal both claim are of one of them alone
        both = ((column_share > 0).any(1) & (diagonal_share > 0).any(1)).nonzero()[0]
        if len(both):
            to_slash, claimed = self._claimed_twice(free[both], column_share[both], diagonal_share[both])
            vertical[both] -= to_slash
            slash[both] -= claimed - to_slash
        scattered = _bits_in(free) - vertical - slash
        return np.stack([sinks, windows, lasts, vertical, slash, scattered], 1)

    def _groups(self) -> list[tuple[slice, int, int]]:
        """Query blocks 64 at a time: which, the diagonal of the last one's column 0, and the words that they see."""
        ends = [min(start + LANES, self._rows) for start in range(0, self._rows, LANES)]
        return [
            (slice(start, end), self._rows - end, -(-int(self._visible[end - 1]) // LANES))
            for start, end in zip([0, *ends], ends, strict=False)
        ]

    def _line_sums(self, free: Lanes) -> tuple[Numbers, Numbers]:
        """How many bits each column and each diagonal M - 1 - I + J has: [K, N] and [K, M + N - 1]."""
        heads, columns = len(free), self._columns
        of_column = np.zeros((heads, columns + LANES), np.int64)
        of_diagonal = np.zeros((heads, self._rows + columns + 2 * LANES), np.int64)
        for rows, first, width in self._groups():
            part = free[:, rows, :width]
            of_column[:, : width * LANES] += _column_sums(part)
            # each row begins one bit later than the one after it
            shift = np.arange(part.shape[1] - 1, -1, -1, dtype=np.uint64)[:, None]
            skewed = np.zeros((heads, part.shape[1], width + 1), np.uint64)
            np.left_shift(part, shift, out=skewed[:, :, :-1])
            skewed[:, :, 1:] |= part >> (LANES - shift)  # by 64 bits: 0
            of_diagonal[:, first : first + (width + 1) * LANES] += _column_sums(skewed)
        return of_column[:, :columns], of_diagonal[:, : self._rows + columns - 1]

    def _line_lengths(self, last: NDArray[np.bool_]) -> tuple[Numbers, Numbers]:
        """How many free blocks each column and each diagonal of each head has; ``last`` is [K, M]."""
        end = np.where(last, self._sink, self._window_start)
        start = np.full_like(end, self._sink)
        diagonal = np.arange(self._rows - 1, -1, -1)  # of each row's column 0
        return (
            _covers(start, end, self._columns),
            _covers(diagonal + start, diagonal + end, self._rows + self._columns - 1),
        )

    def _claimed_twice(self, free: Lanes, column_share: Shares, diagonal_share: Shares) -> tuple[Numbers, Numbers]:
        """Of the bits on a column and a diagonal that are both lines: those of the diagonal, and all; [K] each.

        A bit is the diagonal's if that has the larger share.
        """
        heads = len(free)
        is_column, is_diagonal = column_share > 0, diagonal_share > 0
        to_slash, claimed = np.zeros(heads, np.int64), np.zeros(heads, np.int64)
        for rows, first, width in self._groups():
            columns = min(width * LANES, self._columns)
            height = rows.stop - rows.start
            of_rows = slice(first, first + height + columns - 1)
            on_both = free[:, rows, :width] & _packed(is_column[:, None, :columns], width)
            on_both &= _packed(_by_block(is_diagonal[:, of_rows], columns), width)
            claimed += _bits_in(on_both)
            on_both &= _packed(_by_block(diagonal_share[:, of_rows], columns) > column_share[:, None, :columns], width)
            to_slash += _bits_in(on_both)
        return to_slash, claimed


def _bits_in(words: Lanes) -> Numbers:
    """How many bits are set in each head: [K] of [K, M, V]."""
    return np.bitwise_count(words).sum((1, 2), dtype=np.int64)


def _column_sums(words: Lanes) -> NDArray[np.uint8]:
    """How many of at most 64 rows set each bit: [K, 64 V] of [K, R, V]."""
    bits = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=2, bitorder="little")
    return bits.sum(1, dtype=np.uint8)


def _packed(blocks: NDArray[np.bool_], width: int) -> Lanes:
    """bool [K, R, N] as words [K, R, width]."""
    packed = np.zeros((*blocks.shape[:2], width * (LANES // 8)), np.uint8)
    found = np.packbits(blocks, axis=2, bitorder="little")
    packed[:, :, : found.shape[2]] = found
    return packed.view(np.uint64)


def _by_block(values: NDArray, columns: int) -> NDArray:
    """Of values [K, R + N - 1] of diagonals, from the last row's to the first one's: those of each block, [K, R, N]."""
    return np.lib.stride_tricks.sliding_window_view(values, columns, 1)[:, ::-1]


def _low_bits(counts: Numbers, columns: int) -> Lanes:
    """Rows of words of which the first ``counts[I]`` bits are set."""
    in_word = counts[:, None] - np.arange(0, columns, LANES)
    return np.uint64(2**64 - 1) >> (LANES - in_word.clip(0, LANES)).astype(np.uint64)


def _covers(starts: Numbers, ends: Numbers, size: int) -> Numbers:
    """How many of each head's ranges start … end - 1 hold each of 0 … size - 1: [K, size] of [K, M]."""
    heads = len(starts)
    row = (size + 1) * np.arange(heads)[:, None]
    begun, ended = (
        np.bincount((row + places).ravel(), minlength=heads * (size + 1)).reshape(heads, -1)
        for places in (starts, ends)
    )
    return (begun - ended).cumsum(1)[:, :size]


def _shares(kept: Numbers, length: Numbers) -> Shares:
    """As :func:`_line_shares`."""
    share = kept / length.clip(min=1)
    share[(share < LINE_SHARE) | (length < MIN_LINE_BLOCKS)] = 0
    return share
