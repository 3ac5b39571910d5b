"""Which query rows give a score to which key blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from flexprefill.blockmap.geometry import Geometry, ceil_div
from flexprefill.runtime.memory import PIECE
from flexprefill.variant.variant import PLAIN, AttentionVariant


@dataclass(frozen=True)
class Grid:
    """The blocks that a scorer scores. b is ``block_size``.

    Attributes:
        geometry: The sizes. The grid has them too, each by its own name.
        scale: Factor on the dot products of queries and keys.
        first_key: A row scores every block of which it sees a key, not only those of which it sees all.
        variant: What the attention is besides causal.
        q_len: Queries are the last ``q_len`` of ``kv_len`` positions.
        kv_len: Number of keys.
        block_size: Edge of a block in tokens.
        rows: M, the number of query blocks.
        columns: N, the number of key blocks.
        offset: The position of the first query.
    """

    geometry: Geometry
    scale: float
    first_key: bool
    variant: AttentionVariant = PLAIN
    q_len: int = field(init=False)
    kv_len: int = field(init=False)
    block_size: int = field(init=False)
    rows: int = field(init=False)
    columns: int = field(init=False)
    offset: int = field(init=False)

    def __post_init__(self) -> None:
        for name in ("q_len", "kv_len", "block_size", "rows", "columns", "offset"):
            object.__setattr__(self, name, getattr(self.geometry, name))

    def scored_from(self, device: torch.device | str) -> Tensor:
        """The first position whose query gives a score to each key block, where nothing is cut: int64 [N]."""
        first = torch.arange(self.columns, device=device) * self.block_size
        return first if self.first_key else (first + self.block_size).clamp(max=self.kv_len) - 1

    def scoring_rows(self, device: torch.device | str, I: slice | None = None, J: slice | None = None) -> Tensor:
        """Which rows of query blocks I give a score to which of key blocks J. None means all blocks.

        Returns:
            bool [M, b, N], or [1 or B, 1, M, b, N] where keys are cut.
        """
        if self.variant.cut:
            return self.view(device, I, J).scores(self.first_key)[:, None]
        row = torch.arange(self.rows * self.block_size, device=device).view(self.rows, self.block_size, 1)
        row, first = row[I or slice(None)], self.scored_from(device)[J or slice(None)]
        return (row < self.q_len) & (row + self.offset >= first)

    def scored(self, device: torch.device | str) -> Tensor:
        """Which block pairs have a score: bool [M, N], or [1 or B, 1, M, N] where keys are cut."""
        if self.variant.cut:
            pieces = [(I, J, self.view(device, I, J).scores(self.first_key).any(2)) for I, J in self.pieces()]
            return self.joined(pieces, device)[:, None]
        last_row = ((torch.arange(self.rows, device=device) + 1) * self.block_size).clamp(max=self.q_len) - 1
        return last_row[:, None] + self.offset >= self.scored_from(device)

    def pieces(self) -> Iterator[tuple[slice, slice]]:
        """Query blocks and the key blocks that they can see, in pieces that need no more memory than PIECE.

        With a sliding window a piece has only the key blocks that the window reaches.
        """
        b, window = self.block_size, self.variant.sliding_window
        step = max(1, PIECE // (self.columns * b))
        if window is not None:
            step = min(step, ceil_div(window, b) + 1)
        for first in range(0, self.rows, step):
            end = min(first + step, self.rows)
            last_position = min(self.offset + end * b, self.kv_len) - 1
            first_position = 0 if window is None else max(self.offset + first * b - window + 1, 0)
            yield slice(first, end), slice(first_position // b, last_position // b + 1)

    def joined(self, pieces: list[tuple[slice, slice, Tensor]], device: torch.device | str) -> Tensor:
        """What pieces say of their block pairs, and False elsewhere: bool [1 or B, M, N]."""
        whole = torch.zeros(pieces[0][2].shape[0], self.rows, self.columns, dtype=torch.bool, device=device)
        for I, J, piece in pieces:
            whole[:, I, J] = piece
        return whole

    def view(self, device: torch.device | str, I: slice | None = None, J: slice | None = None) -> View:
        """What each row of query blocks I sees of key blocks J. None means all blocks."""
        I, J = I or slice(0, self.rows), J or slice(0, self.columns)
        b, row = self.block_size, torch.arange(I.start * self.block_size, I.stop * self.block_size, device=device)
        position = (row + self.offset).view(1, -1, b, 1)
        block = torch.arange(J.start, J.stop, device=device)
        block_start, block_end = block * b, ((block + 1) * b).clamp(max=self.kv_len)
        # rows past the end are in no sequence
        inside, index = position < self.kv_len, position.clamp(max=self.kv_len - 1)
        sequences, window = self.variant.sequences, self.variant.sliding_window
        if sequences is None:
            start, end = torch.where(inside, 0, self.kv_len), torch.where(inside, self.kv_len, 0)
        else:
            start = torch.where(inside, sequences.starts[:, index[0]].long(), self.kv_len)
            end = torch.where(inside, sequences.ends[:, index[0]].long(), 0)
        own_first, own_end = torch.maximum(block_start, start), torch.minimum(block_end, end)
        seen_first = own_first
        if window is not None:
            seen_first = torch.maximum(own_first, position - (window - 1))
        seen_end = torch.minimum(own_end, position + 1)
        return View(position, start, end, block_start, block_end, own_first, own_end, seen_first, seen_end)


class View(NamedTuple):
    """What rows see of key blocks: int64, broadcasting to [1 or B, M, b, N]. An end is one past the last."""

    position: Tensor
    start: Tensor  # of the row's sequence; for a row of none the end is not behind the start
    end: Tensor
    block_start: Tensor
    block_end: Tensor
    own_first: Tensor  # the first key of the block that is in the row's sequence, and their end
    own_end: Tensor
    seen_first: Tensor  # the first of these keys that the row sees, and their end
    seen_end: Tensor

    @property
    def sees(self) -> Tensor:
        """Whether the row sees a key of the block."""
        return self.seen_first < self.seen_end

    def scores(self, first_key: bool) -> Tensor:
        """Whether the row gives the block a score: it sees all keys of its own sequence there (first_key: one)."""
        if first_key:
            return self.sees
        whole = (self.seen_first == self.own_first) & (self.seen_end == self.own_end)
        return whole & (self.own_first < self.own_end)
