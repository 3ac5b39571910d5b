"""Geometry: the sizes of a map, and which of its blocks are causally visible.

torch is imported by the functions that need it: a mask file's header is read without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from flexprefill.config import check_whole, plain_number

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WORD_BITS = 32  # key blocks in a word of a map


def ceil_div(a: int, b: int) -> int:
    """ceil(a / b) for non-negative a. Works for symbolic sizes under torch.compile too."""
    return (a + b - 1) // b


class Geometry(NamedTuple):
    """The sizes of a map. Queries are the last ``q_len`` of ``kv_len`` positions, in blocks of ``block_size``."""

    q_len: int
    kv_len: int
    block_size: int

    @property
    def offset(self) -> int:
        """The position of the first query."""
        return self.kv_len - self.q_len

    @property
    def rows(self) -> int:
        """M, the number of query blocks."""
        return ceil_div(self.q_len, self.block_size)

    @property
    def columns(self) -> int:
        """N, the number of key blocks."""
        return ceil_div(self.kv_len, self.block_size)

    @classmethod
    def checked(cls, q_len: int, kv_len: int, block_size: int) -> Geometry:
        """The geometry of a caller's numbers, which may be NumPy's. Raises as `check`."""
        geometry = cls(*map(plain_number, (q_len, kv_len, block_size)))
        geometry.check()
        return geometry

    def check(self) -> None:
        """Raises unless 1 <= q_len <= kv_len and block_size is positive."""
        for name, size in zip(self._fields, self, strict=True):
            check_whole(name, size, 1)
        if self.q_len > self.kv_len:
            raise ValueError(
                f"q_len must be at most kv_len (queries are the last positions), got {self.q_len} > {self.kv_len}"
            )


def visible_blocks(geometry: Geometry, device: torch.device | str) -> Tensor:
    """How many key blocks each query block sees causally, at least in part: int32 [M]."""
    import torch

    # in int64: the end of the last row may be past 2**31
    row_end = torch.arange(1, geometry.rows + 1, device=device) * geometry.block_size
    last_position = row_end.clamp(max=geometry.q_len) + geometry.offset - 1
    return (last_position // geometry.block_size + 1).to(torch.int32)


def causal_blocks(geometry: Geometry, device: torch.device | str) -> Tensor:
    """Which blocks are causally visible at least in part: bool [M, N]."""
    import torch

    columns = torch.arange(geometry.columns, device=device, dtype=torch.int32)
    return columns < visible_blocks(geometry, device)[:, None]


def full_blocks(geometry: Geometry, device: torch.device | str) -> Tensor:
    """How many leading key blocks every row of a query block sees whole: int32 [M].

    A short last key block counts as its nominal size. So it is never whole, and keeps its bounds check.
    """
    import torch

    first_row = torch.arange(geometry.rows, device=device, dtype=torch.int32) * geometry.block_size
    return (first_row + geometry.offset + 1) // geometry.block_size
