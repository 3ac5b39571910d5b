"""Bits to index lists in Triton. The kernel reads each word once and writes each entry of both lists once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flexprefill.blockmap.bits_kernel import bits_below
from flexprefill.blockmap.geometry import Geometry
from flexprefill.runtime.launching import launch

LIST_ROWS = 4  # a program
LIST_WORDS = 32  # a step, one a lane
CHUNK = 128  # zeros a step and row


@triton.jit
def _append(list_rows, words, w, counts, names, PIECES: tl.constexpr):
    """Appends the blocks of words [rows, W], the row's words w, behind counts [rows, 1]; returns the new counts.

    With PIECES, so many names stand in place of each block, those that are not negative. Counts are of blocks.
    """
    sizes = words - ((words >> 1) & 0x55555555)
    sizes = (sizes & 0x33333333) + ((sizes >> 2) & 0x33333333)
    sizes = (sizes + (sizes >> 4)) & 0x0F0F0F0F
    sizes = sizes + (sizes >> 8)
    sizes = (sizes + (sizes >> 16)) & 0x3F
    rank = counts + tl.cumsum(sizes, 1) - sizes
    # bit by bit from the lowest, as often as the fullest word has bits
    for _ in range(0, tl.max(sizes)):
        lowest = words & -words
        bit = ((lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127  # its exponent
        if PIECES == 0:
            tl.store(list_rows + rank, w * 32 + bit, mask=words != 0)
        for piece in tl.static_range(PIECES):
            name = tl.load(names + (w * 32 + bit) * PIECES + piece, mask=words != 0, other=-1)
            tl.store(list_rows + rank * PIECES + piece, name, mask=(words != 0) & (name >= 0))
        rank += 1
        words = words & (words - 1)
    return counts + tl.sum(sizes, 1, keep_dims=True)


@triton.jit
def _zero_tails(list_rows, starts, ends, CHUNK: tl.constexpr):
    """Zeros each row from its start to its end [rows, 1]: up to a multiple of 16 one by one, then in wide stores."""
    aligned = tl.multiple_of((starts + 15) // 16 * 16, [1, 16])
    edge = starts + tl.arange(0, 16)[None, :]
    tl.store(list_rows + edge, 0, mask=(edge < aligned) & (edge < ends))
    first = tl.min(tl.where(aligned < ends, aligned, ends)) // 16 * 16
    for j0 in range(first, tl.max(ends), CHUNK):
        j = tl.multiple_of(j0, 16) + tl.arange(0, CHUNK)[None, :]
        tl.store(list_rows + j, 0, mask=(j >= aligned) & (j < ends))


# without this, each kind of value of these parameters would be compiled for
NOT_SPECIALIZED = "total rows width offset q_len missing uncut_stride_b uncut_stride_h uncut_stride_m".split()


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def lists_kernel(
    words_ptr, uncut_ptr, partial_num_ptr, partial_ptr, full_num_ptr, full_ptr, total, rows, columns, width, offset,
    q_len, heads, uncut_stride_b, uncut_stride_h, uncut_stride_m, uncut_stride_w, names_ptr, missing,
    BLOCK: tl.constexpr, PIECES: tl.constexpr, ALL_PARTIAL: tl.constexpr, UNCUT: tl.constexpr, REUSED: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of blocks: their words [W] to two lists [N] each. Full blocks stand before the partial ones in a row.

    REUSED lists come with counts, and with zeros behind them. So only what was listed is cleared.
    With PIECES the lists hold names [B, N * PIECES] in place of blocks; ``missing`` pieces of the last block have none.
    """
    a_block: tl.constexpr = PIECES if PIECES > 0 else 1
    listed = columns * a_block  # a row's entries
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = row < total
    first_row = (row % rows).to(tl.int32) * BLOCK
    whole = (offset + first_row + 1) // BLOCK
    # a map's words have no other bits; if other words do, no entry may be written past a row's end
    visible = (offset + tl.minimum(first_row + BLOCK, q_len) - 1) // BLOCK + 1
    if ALL_PARTIAL:
        whole = tl.zeros_like(whole)
    end_full = tl.where(inside, listed, 0)
    end_partial = end_full
    if REUSED:
        end_full = tl.load(full_num_ptr + row, mask=inside, other=0)
        end_partial = tl.load(partial_num_ptr + row, mask=inside, other=0)
    full_rows = full_ptr + row * listed
    partial_rows = partial_ptr + row * listed
    head = row // rows
    names = names_ptr
    if PIECES > 0:
        names = names_ptr + (head // heads) * listed
    if UNCUT:
        uncut_rows = uncut_ptr + (head // heads) * uncut_stride_b + (head % heads) * uncut_stride_h
        uncut_rows += (row % rows) * uncut_stride_m
    n_full = tl.zeros([ROWS, 1], tl.int32)
    n_partial = tl.zeros([ROWS, 1], tl.int32)
    n_last = tl.zeros([ROWS, 1], tl.int32)
    for w0 in range(0, width, WORDS):
        w = w0 + tl.arange(0, WORDS)[None, :]
        words = tl.load(words_ptr + row * width + w, mask=inside & (w < width), other=0) & bits_below(visible, w)
        is_whole = bits_below(whole, w)
        if UNCUT:
            is_whole &= tl.load(uncut_rows + w * uncut_stride_w, mask=inside & (w < width), other=0)
        if not ALL_PARTIAL:
            n_full = _append(full_rows, words & is_whole, w, n_full, names, PIECES)
        n_partial = _append(partial_rows, words & ~is_whole, w, n_partial, names, PIECES)
        if PIECES > 1:
            in_last = tl.where(w == (columns - 1) // 32, words >> ((columns - 1) % 32) & 1, 0)
            n_last += tl.sum(in_last, 1, keep_dims=True)
    # a block that is not whole is never full, and the last of a row
    n_full *= a_block
    n_partial = n_partial * a_block - n_last * missing
    tl.store(full_num_ptr + row, n_full, mask=inside)
    tl.store(partial_num_ptr + row, n_partial, mask=inside)
    _zero_tails(full_rows, n_full, end_full, CHUNK)
    _zero_tails(partial_rows, n_partial, end_partial, CHUNK)


def missing_pieces(geometry: Geometry, pieces: int) -> int:
    """How many of the last block's pieces hold no key."""
    return (geometry.columns * geometry.block_size - geometry.kv_len) // (geometry.block_size // pieces)


def fill_lists(
    lists: tuple[Tensor, Tensor, Tensor, Tensor],
    words: Tensor,
    geometry: Geometry,
    all_partial: bool = False,
    uncut: Tensor | None = None,
    names: Tensor | None = None,
    *,
    reused: bool = False,
) -> None:
    """Writes the lists that index_lists.index_lists describes. Reused lists come as an earlier call left them."""
    words = words.contiguous()
    batch, heads, rows, width = words.shape
    total = batch * heads * rows
    of_mask, strides = (words, (0, 0, 0, 0)) if uncut is None else (uncut, uncut.expand(words.shape).stride())
    pieces = 0 if names is None else names.shape[1] // geometry.columns
    # one warp: a loop ends when its lanes are done, without a barrier
    launch(
        lists_kernel, (triton.cdiv(total, LIST_ROWS),), words, of_mask, *lists, total, rows, geometry.columns, width,
        geometry.offset, geometry.q_len, heads, *strides, words if names is None else names,
        0 if pieces < 2 else missing_pieces(geometry, pieces), BLOCK=geometry.block_size, PIECES=pieces,
        ALL_PARTIAL=all_partial, UNCUT=uncut is not None, REUSED=reused, ROWS=LIST_ROWS, WORDS=LIST_WORDS, CHUNK=CHUNK,
        num_warps=1,
    )  # fmt: skip
