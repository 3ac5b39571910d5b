"""Bits to index lists in Triton. It reads each word once and writes each entry of both lists once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flexprefill.blockmap import ceil_div

CHUNK = 1024  # columns a step


@triton.jit
def _zero_tail(row_ptr, start, end, CHUNK: tl.constexpr):
    """Zeros row_ptr[start:end]: up to a multiple of 16 one by one, from there in wide stores."""
    aligned = (start + 15) // 16 * 16
    edge = start + tl.arange(0, 16)
    tl.store(row_ptr + edge, 0, mask=(edge < aligned) & (edge < end))
    for j0 in range(aligned, end, CHUNK):
        j = tl.multiple_of(j0, 16) + tl.arange(0, CHUNK)
        tl.store(row_ptr + j, 0, mask=j < end)


@triton.jit(do_not_specialize=["rows", "width", "offset"])
def lists_kernel(
    words_ptr,
    partial_num_ptr,
    partial_ptr,
    full_num_ptr,
    full_ptr,
    rows,
    columns,
    width,
    offset,
    BLOCK: tl.constexpr,
    ALL_PARTIAL: tl.constexpr,
    REUSED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One row of blocks: its words [W] to two lists [N]. Full blocks stand before the partial ones in a row.

    REUSED lists hold zeros behind the counts that they come with, so only what was listed is cleared.
    """
    row = tl.program_id(0).to(tl.int64)
    whole = (offset + (row % rows).to(tl.int32) * BLOCK + 1) // BLOCK
    if ALL_PARTIAL:
        whole = 0
    end_full = columns
    end_partial = columns
    if REUSED:
        end_full = tl.load(full_num_ptr + row)
        end_partial = tl.load(partial_num_ptr + row)
    full_row = full_ptr + row * columns
    partial_row = partial_ptr + row * columns
    lane = tl.arange(0, CHUNK)
    n_full = 0
    n_all = 0
    for j0 in range(0, columns, CHUNK):
        j = j0 + lane
        word = tl.load(words_ptr + row * width + j // 32, mask=j < columns, other=0)
        kept = (word >> (j % 32)) & 1
        kept_full = tl.where(j < whole, kept, 0)
        rank = n_all + tl.cumsum(kept, 0) - 1
        n_full += tl.sum(kept_full, 0)
        n_all += tl.sum(kept, 0)
        tl.store(full_row + rank, j, mask=kept_full != 0)
        tl.store(partial_row + rank - n_full, j, mask=(kept != 0) & (j >= whole))
    n_partial = n_all - n_full
    tl.store(full_num_ptr + row, n_full)
    tl.store(partial_num_ptr + row, n_partial)
    _zero_tail(full_row, n_full, end_full, CHUNK)
    _zero_tail(partial_row, n_partial, end_partial, CHUNK)


def fill_lists(
    words: Tensor,
    q_len: int,
    kv_len: int,
    block_size: int,
    all_partial: bool,
    lists: tuple[Tensor, Tensor, Tensor, Tensor],
    reused: bool,
) -> None:
    """Writes the lists that flexprefill.lists.index_lists describes. Reused ones come as an earlier call left them."""
    words = words.contiguous()
    columns = ceil_div(kv_len, block_size)
    lists_kernel[(words.shape[0] * words.shape[1] * words.shape[2],)](
        words,
        *lists,
        words.shape[2],
        columns,
        words.shape[3],
        kv_len - q_len,
        BLOCK=block_size,
        ALL_PARTIAL=all_partial,
        REUSED=reused,
        CHUNK=min(CHUNK, max(32, triton.next_power_of_2(columns))),
        num_warps=4,
    )
