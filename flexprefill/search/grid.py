"""Where query rows and key blocks stand: which rows give a score to which blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexprefill.blockmap import ceil_div


class Grid(NamedTuple):
    """The blocks that a scorer scores. M and N are the numbers of query and key blocks, b is ``block_size``.

    Queries are the last ``q_len`` of ``kv_len`` positions.
    """

    q_len: int
    kv_len: int
    block_size: int
    scale: float  # factor on the dot products of queries and keys
    first_key: bool  # a row scores the blocks of which it sees a key, not only those of which it sees all
    sliding_window: int = 0  # keys that a row sees, its own the last; 0: all before it
    starts: Tensor | None = None  # of Sequences, and ends
    ends: Tensor | None = None
    soft_cap: float = 0.0  # on the scaled products; 0: none
    alibi_slopes: Tensor | None = None  # float32 [Hq]

    @property
    def rows(self) -> int:
        """M."""
        return ceil_div(self.q_len, self.block_size)

    @property
    def columns(self) -> int:
        """N."""
        return ceil_div(self.kv_len, self.block_size)

    @property
    def offset(self) -> int:
        """The position of the first query."""
        return self.kv_len - self.q_len

    @property
    def cut(self) -> bool:
        """Whether anything but the causal edge hides keys."""
        return self.starts is not None or self.sliding_window > 0

    def scored_from(self, device: torch.device | str) -> Tensor:
        """The first position whose query gives a score to each key block, where nothing is cut: int64 [N]."""
        first = torch.arange(self.columns, device=device) * self.block_size
        return first if self.first_key else (first + self.block_size).clamp(max=self.kv_len) - 1

    def scoring_rows(self, device: torch.device | str) -> Tensor:
        """Which rows give a score to which key blocks: bool [M, b, N], or [1 or B, 1, M, b, N] where keys are cut."""
        if self.cut:
            view = self.view(device)
            return (view.sees if self.first_key else view.sees_all)[:, None]
        row = torch.arange(self.rows * self.block_size, device=device).view(self.rows, self.block_size, 1)
        return (row < self.q_len) & (row + self.offset >= self.scored_from(device))

    def scored(self, device: torch.device | str) -> Tensor:
        """Which block pairs have a score: bool [M, N], or [1 or B, 1, M, N] where keys are cut."""
        if self.cut:
            return self.scoring_rows(device).any(3)
        last_row = ((torch.arange(self.rows, device=device) + 1) * self.block_size).clamp(max=self.q_len) - 1
        return last_row[:, None] + self.offset >= self.scored_from(device)

    def view(self, device: torch.device | str) -> View:
        """What each row sees of each key block."""
        b, position, J = self.block_size, self.positions(device), torch.arange(self.columns, device=device)
        block_start, block_end = J * b, ((J + 1) * b).clamp(max=self.kv_len)
        if self.starts is None:
            # rows past the end stand in no sequence
            start = torch.where(position < self.kv_len, 0, self.kv_len)
            end = torch.where(position < self.kv_len, self.kv_len, 0)
        else:
            start, end = (self.by_row(tensor, value) for tensor, value in ((self.starts, self.kv_len), (self.ends, 0)))
        own_first, own_end = torch.maximum(block_start, start), torch.minimum(block_end, end)
        seen_first = own_first
        if self.sliding_window:
            seen_first = torch.maximum(own_first, position - (self.sliding_window - 1))
        seen_end = torch.minimum(own_end, position + 1)
        return View(position, start, end, own_first, own_end, seen_first, seen_end)

    def positions(self, device: torch.device | str) -> Tensor:
        """Of all rows, those past the end with theirs: int64 [1, M, b, 1]."""
        row = torch.arange(self.rows * self.block_size, device=device)
        return (row + self.offset).view(1, self.rows, self.block_size, 1)

    def by_row(self, tensor: Tensor, value: int) -> Tensor:
        """What a tensor [1 or B, S_kv] holds for each row: int64 [1 or B, M, b, 1], a value for rows past the end."""
        missing = self.rows * self.block_size - self.q_len
        padded = pad(tensor[:, self.offset :].long(), (0, missing), value=value)
        return padded.view(tensor.shape[0], self.rows, self.block_size, 1)


class View(NamedTuple):
    """What rows see of key blocks: int64, of shapes that broadcast to [1 or B, M, b, N]. Ends are behind the last."""

    position: Tensor
    start: Tensor  # of the row's sequence, and its end; for rows of none the end is not behind the start
    end: Tensor
    own_first: Tensor  # the block's keys that are of the row's sequence
    own_end: Tensor
    seen_first: Tensor  # of these the keys that the row sees
    seen_end: Tensor

    @property
    def sees(self) -> Tensor:
        """Whether the row sees a key of the block."""
        return self.seen_first < self.seen_end

    @property
    def sees_all(self) -> Tensor:
        """Whether the row sees all keys of the block that are of its sequence, and there are any."""
        whole = (self.seen_first == self.own_first) & (self.seen_end == self.own_end)
        return whole & (self.own_first < self.own_end)
