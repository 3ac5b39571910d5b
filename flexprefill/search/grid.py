"""Where query rows and key blocks stand: which rows give a score to which blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flexprefill.blockmap import ceil_div


class Grid(NamedTuple):
    """The blocks that a scorer scores. M and N are the numbers of query and key blocks, b is ``block_size``.

    Queries are the last ``q_len`` of ``kv_len`` positions.
    """

    q_len: int
    kv_len: int
    block_size: int
    scale: float  # factor on the dot products of queries and keys
    first_key: bool  # a row scores the blocks whose first key it sees, not only those that it sees whole

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

    def scored_from(self, device: torch.device | str) -> Tensor:
        """The first position whose query gives a score to each key block: int64 [N]."""
        first = torch.arange(self.columns, device=device) * self.block_size
        return first if self.first_key else (first + self.block_size).clamp(max=self.kv_len) - 1

    def scoring_rows(self, device: torch.device | str) -> Tensor:
        """Which rows give a score to which key blocks: bool [M, b, N]."""
        row = torch.arange(self.rows * self.block_size, device=device).view(self.rows, self.block_size, 1)
        return (row < self.q_len) & (row + self.offset >= self.scored_from(device))

    def scored(self, device: torch.device | str) -> Tensor:
        """Which block pairs have a score: bool [M, N]."""
        last_row = ((torch.arange(self.rows, device=device) + 1) * self.block_size).clamp(max=self.q_len) - 1
        return last_row[:, None] + self.offset >= self.scored_from(device)
