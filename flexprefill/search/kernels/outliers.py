"""The outliers' side of the two-sided search in Triton: all rows of a query block against a few keys of each block."""

from __future__ import annotations

import triton
import triton.language as tl

from flexprefill.blockmap.bits import WORD_BITS
from flexprefill.search.two_sided import OUTLIER_GROUP

GROUP_BLOCKS = tl.constexpr(OUTLIER_GROUP)
GROUP_WORDS = tl.constexpr(OUTLIER_GROUP // WORD_BITS)


@triton.jit
def always_bits(J, I, visible, rows, sink_blocks, window_blocks, last_full_blocks):
    """Whether block J is kept whatever it holds, of those that query block I can see."""
    full = I >= rows - last_full_blocks
    return (J < visible) & ((J < sink_blocks) | (J >= visible - window_blocks) | full)


@triton.jit
def products(
    q, query_rows, query_d, key_rows, key_d, seen,
    D: tl.constexpr, D_PAD: tl.constexpr, D_STEP: tl.constexpr,
):  # fmt: skip
    """Queries [R] times keys [K], by pointers to their rows: float32 [R, K]. q is what load_rows gave of the queries.

    Keys that are not seen count as zeros.
    """
    d = tl.arange(0, D_STEP)
    if D_STEP == D_PAD:
        k = tl.load(key_rows[None, :] + d[:, None] * key_d, mask=seen[None, :] & (d < D)[:, None], other=0.0)
        x = tl.dot(q, k)
    else:
        # float32 takes much shared memory: its products are made of three of shorter numbers
        x = tl.zeros([query_rows.shape[0], key_rows.shape[0]], tl.float32)
        for d0 in tl.range(0, D_PAD, D_STEP, num_stages=1):
            inside = d0 + d < D
            part = tl.load(query_rows[:, None] + (d0 + d)[None, :] * query_d, mask=inside[None, :], other=0.0)
            k = tl.load(key_rows[None, :] + (d0 + d)[:, None] * key_d, mask=seen[None, :] & inside[:, None], other=0.0)
            x = tl.dot(part, k, x, input_precision="tf32x3")
    return x


@triton.jit
def load_rows(query_rows, query_d, D: tl.constexpr, D_PAD: tl.constexpr, D_STEP: tl.constexpr):
    """Queries by pointers to their rows, if `products` wants them at once."""
    q = 0.0
    if D_STEP == D_PAD:
        d = tl.arange(0, D_PAD)
        q = tl.load(query_rows[:, None] + d[None, :] * query_d, mask=(d < D)[None, :], other=0.0)
    return q


@triton.jit
def _store_words(words_row, kept, w, width, FOUND: tl.constexpr):
    """Writes words w of a row. With FOUND what they hold already stays."""
    bits = tl.sum(kept.to(tl.int32) << tl.arange(0, 32)[None, :], 1)
    if FOUND:
        bits = bits | tl.load(words_row + w, mask=w < width, other=0)
    tl.store(words_row + w, bits, mask=w < width)


NOT_SPECIALIZED = [
    "q_len", "kv_len", "rows", "columns", "width", "tiles", "sink_blocks", "window_blocks", "last_full_blocks",
]  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def outliers_kernel(
    query_ptr, key_ptr, outliers_ptr, words_ptr, query_b, query_h, query_s, query_d, key_b, key_h, key_s, key_d,
    q_len, kv_len, rows, columns, width, tiles, HEADS, GROUP, qk_scale, log2_share, sink_blocks, window_blocks,
    last_full_blocks, COUNT: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr,
    D_STEP: tl.constexpr, FOUND: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A grid over (query block, head), the last query blocks first. See two_sided.blocks_of_outliers.

    Writes words int32 [B, HEADS, rows, width]. With FOUND they hold blocks already, which stay.
    """
    program = tl.program_id(0)
    heads = tiles // rows
    I = rows - 1 - program // heads
    batch_head = (program % heads).to(tl.int64)
    batch = batch_head // HEADS
    head = batch_head % HEADS
    offset = kv_len - q_len
    r = tl.arange(0, BLOCK)
    row = I * BLOCK + r
    position = offset + tl.minimum(row, q_len - 1)  # rows behind the end repeat the last one
    own = position // BLOCK
    query_rows = query_ptr + batch * query_b + head * query_h + tl.minimum(row, q_len - 1).to(tl.int64) * query_s
    q = load_rows(query_rows, query_d, D, D_PAD, D_STEP)
    keys = key_ptr + batch * key_b + (head // GROUP) * key_h
    # the row's own key block, exact; a chunk's query block can lie in two
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    first_own = (offset + I * BLOCK) // BLOCK
    visible = tl.max(position, 0) // BLOCK + 1
    STEP: tl.constexpr = min(BLOCK, 64)  # a whole block of products would take too many registers
    for start in tl.range(first_own * BLOCK, visible * BLOCK, STEP, num_stages=1):
        at = start + tl.arange(0, STEP)
        of_keys = keys + tl.minimum(at, kv_len - 1).to(tl.int64) * key_s
        x = products(q, query_rows, query_d, of_keys, key_d, at < kv_len, D, D_PAD, D_STEP) * qk_scale
        x = tl.where((at[None, :] <= position[:, None]) & (own[:, None] == start // BLOCK), x, float("-inf"))
        top = tl.maximum(best, tl.max(x, 1))
        shift = tl.where(top == float("-inf"), 0.0, top)
        total = total * tl.exp2(best - shift) + tl.sum(tl.exp2(x - shift[:, None]), 1)
        best = top
    e = tl.arange(0, GROUP_BLOCKS * COUNT)
    words_row = words_ptr + (batch_head * rows + I) * width
    outliers = outliers_ptr + (batch_head // GROUP) * columns * COUNT * D
    near = best + tl.log2(total)
    far = tl.full([BLOCK], float("-inf"), tl.float32)
    lane = tl.arange(0, 32)
    w = tl.arange(0, GROUP_WORDS)
    for t in tl.range(0, visible - 1, GROUP_BLOCKS, num_stages=STAGES):
        block = t + e // COUNT
        of_tile = outliers + (t * COUNT + e) * D
        x = products(q, query_rows, query_d, of_tile, 1, block < columns, D, D_PAD, D_STEP) * qk_scale
        if t + GROUP_BLOCKS > first_own:
            x = tl.where(block[None, :] < own[:, None], x, float("-inf"))
        far = tl.maximum(far, tl.max(x, 1))
        most = tl.maximum(near, far)
        peak = tl.max(x - (most + tl.log2(tl.exp2(near - most) + tl.exp2(far - most)))[:, None], 0)
        if COUNT > 1:
            peak = tl.max(tl.reshape(peak, [GROUP_BLOCKS, COUNT]), 1)
        peak = tl.reshape(peak, [GROUP_WORDS, 32])
        column = t + w[:, None] * 32 + lane[None, :]
        kept = ((peak < log2_share) == 0) & (column < visible - 1)
        kept = kept | always_bits(column, I, visible, rows, sink_blocks, window_blocks, last_full_blocks)
        _store_words(words_row, kept, t // 32 + w, width, FOUND)
    # words behind the last outlier
    for t in range((visible - 1 + GROUP_BLOCKS - 1) // GROUP_BLOCKS * GROUP_BLOCKS, width * 32, GROUP_BLOCKS):
        column = t + w[:, None] * 32 + lane[None, :]
        kept = always_bits(column, I, visible, rows, sink_blocks, window_blocks, last_full_blocks)
        _store_words(words_row, kept, t // 32 + w, width, FOUND)
