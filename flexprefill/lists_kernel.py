"""Bits to index lists in Triton. It reads each word once and writes each entry of both lists once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill.blockmap import ceil_div

CHUNK = 1024  # columns a step


@triton.jit(do_not_specialize=["rows", "columns", "width", "offset"])
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
    CHUNK: tl.constexpr,
):
    """One row of blocks: its words [W] to two lists [N]. Full blocks stand before the partial ones in a row."""
    row = tl.program_id(0).to(tl.int64)
    whole = (offset + (row % rows).to(tl.int32) * BLOCK + 1) // BLOCK
    if ALL_PARTIAL:
        whole = 0
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
        tl.store(full_ptr + row * columns + rank, j, mask=kept_full != 0)
        tl.store(partial_ptr + row * columns + rank - n_full, j, mask=(kept != 0) & (j >= whole))
    n_partial = n_all - n_full
    tl.store(full_num_ptr + row, n_full)
    tl.store(partial_num_ptr + row, n_partial)
    for j0 in range(0, columns, CHUNK):
        j = j0 + lane
        tl.store(full_ptr + row * columns + j, 0, mask=(j >= n_full) & (j < columns))
        tl.store(partial_ptr + row * columns + j, 0, mask=(j >= n_partial) & (j < columns))


def index_lists(
    words: Tensor, q_len: int, kv_len: int, block_size: int, all_partial: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See flexprefill.lists.index_lists."""
    batch, heads, rows, width = words.shape
    words = words.contiguous()
    columns = ceil_div(kv_len, block_size)
    counts, indices = (batch, heads, rows), (batch, heads, rows, columns)
    outputs = tuple(
        torch.empty(shape, dtype=torch.int32, device=words.device) for shape in (counts, indices, counts, indices)
    )
    lists_kernel[(batch * heads * rows,)](
        words,
        *outputs,
        rows,
        columns,
        width,
        kv_len - q_len,
        BLOCK=block_size,
        ALL_PARTIAL=all_partial,
        CHUNK=min(CHUNK, max(32, triton.next_power_of_2(columns))),
        num_warps=4,
    )
    return outputs
