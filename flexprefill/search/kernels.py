"""The search in Triton: one kernel pools the keys, one scores and thresholds the blocks and writes the bits."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill.blockmap import WORD_BITS, ceil_div
from flexprefill.search.rule import Rule

LOG2_E = math.log2(math.e)
SMALLEST_SCALE = 2.0**-126
LARGEST_STEP = 64  # words that a step turns scores into, reading all their scores
GLUON_VERSIONS = ("3.6.", "3.7.")  # of Triton; hopper.py is written in its experimental dialect
SMALLEST_LOG2_ALPHA = tl.constexpr(-100.0)  # below it a block kept could underflow
LARGE = tl.constexpr(1e30)  # products below it are far from overflow in float32


@triton.jit
def pool_kernel(
    key_ptr,
    means_ptr,
    stride_b,
    stride_h,
    stride_s,
    stride_d,
    kv_len,
    columns,
    HEADS,
    bounds_ptr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BOUNDS: tl.constexpr,
):
    """One key block's mean in float32: key [B, H, S, D] to means [B, H, N, D], contiguous.

    BOUNDS: of the keys of the batch entry's sequence alone, from a start to an end.
    """
    J = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    s = J * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D_PAD)
    base = key_ptr + (head // HEADS) * stride_b + (head % HEADS) * stride_h
    inside = (s[:, None] < kv_len) & (d[None, :] < D)
    count = tl.minimum(kv_len - J * BLOCK, BLOCK)
    if BOUNDS:
        start = tl.load(bounds_ptr + head // HEADS * 2)
        end = tl.load(bounds_ptr + head // HEADS * 2 + 1)
        inside = inside & (s[:, None] >= start) & (s[:, None] < end)
        count = tl.maximum(tl.minimum((J + 1) * BLOCK, end) - tl.maximum(J * BLOCK, start), 1)
    offsets = s.to(tl.int64)[:, None] * stride_s + d[None, :] * stride_d
    keys = tl.load(base + offsets, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(keys, 0) / count.to(tl.float32)
    tl.store(means_ptr + (head * columns + J) * D + d, mean.to(means_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _scoring_positions(j, bounds, BLOCK: tl.constexpr, FIRST_KEY: tl.constexpr):
    """The first and the last position whose query gives a score to block j, for a sequence and a window."""
    start, end, window = bounds
    own_first = tl.maximum(j * BLOCK, start)
    own_last = tl.minimum((j + 1) * BLOCK, end) - 1
    nearest = own_first if FIRST_KEY else own_last
    farthest = (own_last if FIRST_KEY else own_first) + window - 1
    return nearest, tl.where(own_first <= own_last, farthest, -1)


@triton.jit
def _is_scored(j, scored, first_row, last, bounds, BLOCK: tl.constexpr, FIRST_KEY: tl.constexpr, CUT: tl.constexpr):
    """Which blocks j [n, 1] have a score from query blocks whose rows stand at first_row … last [1, query blocks]."""
    is_scored = j < scored
    if CUT:
        nearest, farthest = _scoring_positions(j, bounds, BLOCK, FIRST_KEY)
        is_scored = is_scored & (tl.maximum(nearest, first_row) <= tl.minimum(farthest, last))
    return is_scored


@triton.jit
def _tile_products(
    j,
    inputs,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    D_STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST_KEY: tl.constexpr,
    MASKED: tl.constexpr,
    CUT: tl.constexpr,
):
    """Products of a tile of means with the query blocks, transposed: float32 [J, query blocks, rows].

    MASKED puts hidden where a row does not see the whole of block j (FIRST_KEY: its first key), or is past the end.
    """
    means_base, query_base, q_t, columns, row, offset, q_len, kv_len, stride_s, stride_d, hidden, bounds = inputs
    if D_STEP == D_PAD:
        d = tl.arange(0, D_PAD)
        pointers = means_base + j[:, None] * D + d[None, :]
        if MASKED or D_PAD != D:
            means = tl.load(pointers, mask=(j[:, None] < columns) & (d[None, :] < D), other=0.0)
        else:
            means = tl.load(pointers)
        products = tl.dot(means, q_t, input_precision="ieee")
    else:
        products = tl.zeros([j.shape[0], row.shape[0]], tl.float32)
        for d0 in range(0, D_PAD, D_STEP):
            d = d0 + tl.arange(0, D_STEP)
            mask = (j[:, None] < columns) & (d[None, :] < D)
            means = tl.load(means_base + j[:, None] * D + d[None, :], mask=mask, other=0.0)
            q_offsets = row.to(tl.int64)[None, :] * stride_s + d[:, None] * stride_d
            q_mask = (row[None, :] < q_len) & (d[:, None] < D)
            part = tl.load(query_base + q_offsets, mask=q_mask, other=0.0)
            products = tl.dot(means, part, products, input_precision="ieee")
    if CUT:
        nearest, farthest = _scoring_positions(j, bounds, BLOCK, FIRST_KEY)
        position = row[None, :] + offset
        inside = (position >= bounds[0]) & (position < bounds[1])
        scores = inside & (position >= nearest[:, None]) & (position <= farthest[:, None])
        products = tl.where(scores, products, hidden)
    elif MASKED:
        first_to_see = j * BLOCK - offset if FIRST_KEY else tl.minimum((j + 1) * BLOCK, kv_len) - 1 - offset
        products = tl.where((row[None, :] >= first_to_see[:, None]) & (row[None, :] < q_len), products, hidden)
    return tl.reshape(products, [j.shape[0], row.shape[0] // BLOCK, BLOCK])


@triton.jit
def _sums(products, qk_scale, shift):
    """Block scores relative to 2^shift [query blocks]: sums over the rows, [J, query blocks]."""
    # fused by name: columns of equal products get equal sums, masked or not
    terms = tl.exp2(tl.fma(products, qk_scale, -shift[None, :, None]))
    # in two steps: one long chain of additions in each thread would wait for itself
    return tl.sum(tl.sum(tl.reshape(terms, [terms.shape[0], terms.shape[1], 8, terms.shape[2] // 8]), 2), 2)


@triton.jit
def _log_sums(products, qk_scale):
    """log2 of the block scores, each sum taken relative to the block's own largest score: [J, query blocks]."""
    best = tl.where(qk_scale > 0, tl.max(products, 2), tl.min(products, 2))
    # an all -inf column must not become NaN through -inf - -inf
    shift = tl.where(tl.abs(best) == float("inf"), 0.0, best)
    # products of huge size differ before they are scaled: their scaled values round too coarsely to be subtracted
    return best * qk_scale + tl.log2(tl.sum(tl.exp2((products - shift[:, :, None]) * qk_scale), 2))


@triton.jit
def _store(scratch_base, scores, j, columns, stride, best):
    """Stores block scores [J, query blocks] and returns the running maxima of the finite ones."""
    q = tl.arange(0, scores.shape[1])
    inside = j[:, None] < columns
    tl.store(scratch_base + q[None, :] * stride + j[:, None], scores, mask=inside)
    return tl.maximum(best, tl.where((tl.abs(scores) < float("inf")) & inside, scores, float("-inf")))


@triton.jit
def _load_queries(query_base, stride_s, stride_d, row, q_len, D: tl.constexpr, D_PAD: tl.constexpr):
    """The rows of one head's query blocks, transposed: [D, rows]."""
    d = tl.arange(0, D_PAD)
    offsets = row.to(tl.int64)[:, None] * stride_s + d[None, :] * stride_d
    mask = (row[:, None] < q_len) & (d[None, :] < D)
    return tl.trans(tl.load(query_base + offsets, mask=mask, other=0.0))


@triton.jit
def _load_scores(scratch_base, offsets, member_stride, mask, other, logs, MEMBERS: tl.constexpr):
    """Block scores, of the query heads that share a mask together: sums, or log2 of sums."""
    scores = tl.load(scratch_base + offsets, mask=mask, other=other)
    for member in tl.static_range(1, MEMBERS):
        more = tl.load(scratch_base + member * member_stride + offsets, mask=mask, other=other)
        if logs:
            best = tl.maximum(scores, more)
            shift = tl.where(tl.abs(best) == float("inf"), 0.0, best)
            scores = shift + tl.log2(tl.exp2(scores - shift) + tl.exp2(more - shift))
        else:
            scores += more
    return scores


@triton.jit
def _best_of_group(
    scratch_base,
    stride,
    member_stride,
    first_tile,
    most,
    rows_seen,
    logs,
    TILE: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST_KEY: tl.constexpr,
    CUT: tl.constexpr,
):
    """The greatest finite scores of each query block [TILE, query blocks], and where the sums say too little."""
    scored, first_row, last, bounds = rows_seen
    q = tl.arange(0, scored.shape[0])
    best = tl.full([TILE, scored.shape[0]], float("-inf"), tl.float32)
    doubtful = tl.zeros([TILE, scored.shape[0]], tl.int1)
    for j0 in range(first_tile, most, TILE):
        j = j0 + tl.arange(0, TILE)
        mask = _is_scored(j[:, None], scored[None, :], first_row[None, :], last[None, :], bounds, BLOCK, FIRST_KEY, CUT)
        offsets = q[None, :] * stride + j[:, None]
        scores = _load_scores(scratch_base, offsets, member_stride, mask, float("-inf"), logs, MEMBERS)
        best = tl.maximum(best, tl.where(tl.abs(scores) < float("inf"), scores, float("-inf")))
        doubtful = doubtful | (mask & ((scores == 0) | (scores == float("inf"))))
    return best, doubtful


@triton.jit
def _add_sums(
    products,
    qk_scale,
    shift,
    scratch_base,
    j,
    columns,
    stride,
    rows_seen,
    best,
    doubtful,
    BLOCK: tl.constexpr,
    FIRST_KEY: tl.constexpr,
    CUT: tl.constexpr,
):
    """Stores a tile's block scores relative to 2^shift; doubtful where that says too little."""
    sums = _sums(products, qk_scale, shift)
    best = _store(scratch_base, sums, j, columns, stride, best)
    scored, first_row, last, bounds = rows_seen
    mask = _is_scored(j[:, None], scored[None, :], first_row[None, :], last[None, :], bounds, BLOCK, FIRST_KEY, CUT)
    return best, doubtful | (mask & ((sums == 0) | (sums == float("inf"))))


@triton.jit(
    do_not_specialize=[
        "q_len",
        "kv_len",
        "rows",
        "columns",
        "width",
        "tiles",
        "sink",
        "window",
        "last_full",
        "min_blocks",
        "sliding_window",
    ]
)
def search_kernel(
    query_ptr,
    means_ptr,
    words_ptr,
    scratch_ptr,
    stride_b,
    stride_h,
    stride_s,
    scratch_stride,
    q_len,
    kv_len,
    rows,
    columns,
    width,
    tiles,
    HEADS,
    GROUP,
    qk_scale,
    log2_alpha,
    sink,
    window,
    last_full,
    min_blocks,
    stride_d,
    bounds_ptr,
    sliding_window,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERY_BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
    D_STEP: tl.constexpr,
    WORDS: tl.constexpr,
    MEMBERS: tl.constexpr,
    FIRST_KEY: tl.constexpr,
    CUT: tl.constexpr,
):
    """A persistent grid over (QUERY_BLOCKS neighbouring query blocks, mask): scores into scratch rows of the
    program, then the bits. MEMBERS query heads share a mask: each has scratch rows of its own, added as they are read.

    The products are transposed, means × queries, so that the sums over the query rows run along each thread's own
    registers, and neighbouring query blocks share each tile of means. The sums are taken relative to the largest
    score of the first tile; where that could overflow or hide a score that is not finite, the row is scored again
    relative to each block's own maximum. Query blocks go from the last, which see most, to the first.

    CUT: each batch entry holds one sequence, from a start to an end, and rows see a sliding window. Scores then begin
    with the tile of the first block that a row sees.
    """
    program = tl.program_id(0)
    offset = kv_len - q_len
    member_stride = QUERY_BLOCKS * scratch_stride
    scratch_base = scratch_ptr + program.to(tl.int64) * MEMBERS * member_stride
    hidden = tl.where(qk_scale > 0, float("-inf"), float("inf"))
    q = tl.arange(0, QUERY_BLOCKS)
    r = tl.arange(0, QUERY_BLOCKS * BLOCK)
    groups = (rows + QUERY_BLOCKS - 1) // QUERY_BLOCKS
    masks_total = tiles // groups
    for tile in range(program, tiles, tl.num_programs(0)):
        I0 = (groups - 1 - tile // masks_total) * QUERY_BLOCKS
        batch_head = (tile % masks_total).to(tl.int64) * MEMBERS  # the first of the mask's
        I = I0 + q
        last = offset + tl.minimum((I + 1) * BLOCK, q_len) - 1  # position of the block's last row
        end = kv_len
        last_rows = rows  # query blocks up to the one that holds the sequence's last row
        sinks_end = sink
        lowest = tl.zeros([QUERY_BLOCKS], tl.int32)  # the first block that a row sees
        first_row = offset + I * BLOCK
        bounds = (0, kv_len, 0)
        if CUT:
            start = tl.load(bounds_ptr + batch_head // HEADS * 2)
            end = tl.load(bounds_ptr + batch_head // HEADS * 2 + 1)
            bounds = (start, end, sliding_window)
            first_row = tl.maximum(first_row, start)
            last = tl.minimum(last, end - 1)
            last_rows = (tl.maximum(end - offset, 0) + BLOCK - 1) // BLOCK
            sinks_end = start // BLOCK + sink
            lowest = tl.maximum(start, first_row - sliding_window + 1) // BLOCK
        visible = last // BLOCK + 1
        if CUT:
            visible = tl.where(first_row <= last, visible, 0)
        window_start = tl.where((I >= last_rows - last_full) | (visible <= sinks_end), 0, visible - window)
        compares = (I < rows) & (window_start > lowest)  # else all is kept whatever the scores
        # blocks that the last row sees, whole if not FIRST_KEY
        seen = visible
        if not FIRST_KEY:
            seen = tl.where(last + 1 == end, (end + BLOCK - 1) // BLOCK, (last + 1) // BLOCK)
        scored = tl.where(compares, seen, 0)
        most = tl.max(scored, 0)
        rows_seen = (scored, first_row, last, bounds)
        first_tile = 0
        if CUT:
            first_tile = tl.min(tl.where(compares, lowest, most), 0) // TILE * TILE
        threshold = tl.zeros([QUERY_BLOCKS], tl.float32)
        logs = most >= 0  # scores are in log2; else sums relative to 2^shift
        if most > 0:
            best = tl.full([TILE, QUERY_BLOCKS], float("-inf"), tl.float32)
            row = I0 * BLOCK + r
            batch_base = query_ptr + (batch_head // HEADS) * stride_b
            head = batch_head % HEADS
            means_base = means_ptr + (batch_head // GROUP) * columns * D
            q_t = 0.0
            if D_STEP == D_PAD:
                # also for the second pass: loaded once more there, it would cost the hot loop registers
                q_t = _load_queries(batch_base + head * stride_h, stride_s, stride_d, row, q_len, D, D_PAD)
                logs = (min_blocks > 0) | (log2_alpha < SMALLEST_LOG2_ALPHA)
                if not logs:
                    shift = tl.zeros([QUERY_BLOCKS], tl.float32)
                    doubtful = tl.zeros([TILE, QUERY_BLOCKS], tl.int1)
                    # blocks in tiles that every row sees whole
                    unmasked = (offset + I0 * BLOCK + 1) // BLOCK // TILE * TILE
                    if q_len < (I0 + QUERY_BLOCKS) * BLOCK:
                        unmasked = 0
                    if CUT:
                        unmasked = 0
                    for member in range(0, MEMBERS):
                        scratch = scratch_base + member * member_stride
                        query_base = batch_base + (head + member) * stride_h
                        if MEMBERS > 1:
                            q_t = _load_queries(query_base, stride_s, stride_d, row, q_len, D, D_PAD)
                        inputs = (
                            means_base, query_base, q_t, columns, row, offset, q_len, kv_len, stride_s, stride_d,
                            hidden, bounds,
                        )  # fmt: skip
                        j = first_tile + tl.arange(0, TILE)
                        products = _tile_products(j, inputs, D, D_PAD, D_STEP, BLOCK, FIRST_KEY, True, CUT)
                        if member == 0:
                            shift = tl.max(tl.max(products * qk_scale, 2), 0)
                            shift = tl.where(tl.abs(shift) < LARGE, shift, 0.0)
                        best, doubtful = _add_sums(
                            products,
                            qk_scale,
                            shift,
                            scratch,
                            j,
                            columns,
                            scratch_stride,
                            rows_seen,
                            best,
                            doubtful,
                            BLOCK,
                            FIRST_KEY,
                            CUT,
                        )
                        for j0 in range(TILE, unmasked, TILE):
                            j = j0 + tl.arange(0, TILE)
                            products = _tile_products(j, inputs, D, D_PAD, D_STEP, BLOCK, FIRST_KEY, False, CUT)
                            best, doubtful = _add_sums(
                                products,
                                qk_scale,
                                shift,
                                scratch,
                                j,
                                columns,
                                scratch_stride,
                                rows_seen,
                                best,
                                doubtful,
                                BLOCK,
                                FIRST_KEY,
                                CUT,
                            )
                        for j0 in range(tl.maximum(unmasked, first_tile + TILE), most, TILE):
                            j = j0 + tl.arange(0, TILE)
                            products = _tile_products(j, inputs, D, D_PAD, D_STEP, BLOCK, FIRST_KEY, True, CUT)
                            best, doubtful = _add_sums(
                                products,
                                qk_scale,
                                shift,
                                scratch,
                                j,
                                columns,
                                scratch_stride,
                                rows_seen,
                                best,
                                doubtful,
                                BLOCK,
                                FIRST_KEY,
                                CUT,
                            )
                    if MEMBERS > 1:
                        tl.debug_barrier()
                        best, doubtful = _best_of_group(
                            scratch_base,
                            scratch_stride,
                            member_stride,
                            first_tile,
                            most,
                            rows_seen,
                            False,
                            TILE,
                            MEMBERS,
                            BLOCK,
                            FIRST_KEY,
                            CUT,
                        )
                        tl.debug_barrier()  # scores that are taken again overwrite those that others may still read
                    logs = tl.max(doubtful.to(tl.int32)) != 0
                    threshold = tl.max(best, 0) * tl.exp2(log2_alpha)
            if logs:
                best = tl.full([TILE, QUERY_BLOCKS], float("-inf"), tl.float32)
                for member in range(0, MEMBERS):
                    scratch = scratch_base + member * member_stride
                    query_base = batch_base + (head + member) * stride_h
                    if (D_STEP == D_PAD) and (MEMBERS > 1):
                        q_t = _load_queries(query_base, stride_s, stride_d, row, q_len, D, D_PAD)
                    inputs = (
                        means_base, query_base, q_t, columns, row, offset, q_len, kv_len, stride_s, stride_d,
                        hidden, bounds,
                    )  # fmt: skip
                    for j0 in range(first_tile, most, TILE):
                        j = j0 + tl.arange(0, TILE)
                        products = _tile_products(j, inputs, D, D_PAD, D_STEP, BLOCK, FIRST_KEY, True, CUT)
                        best = _store(scratch, _log_sums(products, qk_scale), j, columns, scratch_stride, best)
                if MEMBERS > 1:
                    tl.debug_barrier()
                    best, _ = _best_of_group(
                        scratch_base,
                        scratch_stride,
                        member_stride,
                        first_tile,
                        most,
                        rows_seen,
                        True,
                        TILE,
                        MEMBERS,
                        BLOCK,
                        FIRST_KEY,
                        CUT,
                    )
                threshold = tl.max(best, 0) + log2_alpha
            # the scores were written by other threads of this program
            tl.debug_barrier()

        if min_blocks > 0:
            # the min_blocks-th best score, ties counted together: step down from one distinct value to the next
            kth = tl.full([QUERY_BLOCKS], float("inf"), tl.float32)
            count = tl.zeros([QUERY_BLOCKS], tl.int32)
            for _ in range(0, tl.where(most > min_blocks, min_blocks, 0)):
                below = tl.full([TILE, QUERY_BLOCKS], float("-inf"), tl.float32)
                for j0 in range(first_tile, most, TILE):
                    j = j0 + tl.arange(0, TILE)
                    mask = _is_scored(
                        j[:, None], scored[None, :], first_row[None, :], last[None, :], bounds, BLOCK, FIRST_KEY, CUT
                    )
                    offsets = q[None, :] * scratch_stride + j[:, None]
                    L = _load_scores(scratch_base, offsets, member_stride, mask, float("-inf"), True, MEMBERS)
                    below = tl.maximum(
                        below, tl.where((tl.abs(L) < float("inf")) & (kth[None, :] > L), L, float("-inf"))
                    )
                kth = tl.where(count < min_blocks, tl.max(below, 0), kth)
                equal = tl.zeros([TILE, QUERY_BLOCKS], tl.int32)
                for j0 in range(first_tile, most, TILE):
                    j = j0 + tl.arange(0, TILE)
                    mask = _is_scored(
                        j[:, None], scored[None, :], first_row[None, :], last[None, :], bounds, BLOCK, FIRST_KEY, CUT
                    )
                    offsets = q[None, :] * scratch_stride + j[:, None]
                    L = _load_scores(scratch_base, offsets, member_stride, mask, float("nan"), True, MEMBERS)
                    equal += (L >= kth[None, :]).to(tl.int32)
                count = tl.sum(equal, 0)
            # a row that has no more than these keeps them all
            threshold = tl.minimum(threshold, tl.where(scored > min_blocks, kth, float("-inf")))

        words_row = words_ptr + (batch_head * rows + I0) * width
        for w0 in range(0, width, WORDS):
            w = w0 + tl.arange(0, WORDS)
            j = w[None, :, None] * 32 + tl.arange(0, 32)[None, None, :]
            scored_here = _is_scored(
                j,
                scored[:, None, None],
                first_row[:, None, None],
                last[:, None, None],
                bounds,
                BLOCK,
                FIRST_KEY,
                CUT,
            )
            offsets = q[:, None, None] * scratch_stride + j
            L = _load_scores(scratch_base, offsets, member_stride, scored_here, float("-inf"), logs, MEMBERS)
            chosen = scored_here & ((L >= threshold[:, None, None]) | ((tl.abs(L) < float("inf")) == 0))
            keep = (j < visible[:, None, None]) & (chosen | (j < sinks_end) | (j >= window_start[:, None, None]))
            if CUT:
                keep = keep & (j >= lowest[:, None, None])
            bits = tl.sum(keep.to(tl.int32) << tl.arange(0, 32)[None, None, :], 2)
            for member in tl.static_range(0, MEMBERS):
                words_member = words_row + member * rows * width
                inside = (w[None, :] < width) & (I[:, None] < rows)
                tl.store(words_member + q[:, None] * width + w[None, :], bits, mask=inside)
        # the next tile overwrites scores that other threads may still read
        tl.debug_barrier()


class Launch(NamedTuple):
    """How score_words launches a kernel. The choice depends on shapes and dtype alone: nothing is tuned at run time."""

    hopper: bool  # hopper.search_kernel
    tile: int  # means a step: the first operand of the product, one warpgroup's rows
    query_rows: int  # of the neighbouring query blocks that share each tile of means
    d_step: int  # of the head dimension, a product
    warps: int
    stages: int
    programs: int  # a multiprocessor
    registers: int | None  # a cap a thread


# Measured on an H200 (docs/search_kernel.md)
def _launch(query: Tensor, rule: Rule, cut: bool) -> Launch:
    head_dim = query.shape[3]
    if not cut and hopper_takes(query, rule):
        return Launch(True, 64, 128, 128, 4, 1, 4, 128)
    if query.dtype == torch.float32 and query.is_cuda:
        # its products are exact, not tensor-core ones, and registers are few
        return Launch(False, 64, 128, 32, 4, 2, 2, None)
    if head_dim > 128 or rule.kv_masks:
        # a loop over the group's heads around the tiles' takes registers too
        return Launch(False, 64, 128, 256, 4, 2, 2, None)
    return Launch(False, 64, 128, 128, 4, 2, 3, 168)


def hopper_takes(query: Tensor, rule: Rule) -> bool:
    """Whether hopper.search_kernel can do this search: the common case, on a Hopper GPU."""
    # what the tensor memory accelerator reads
    aligned = query.data_ptr() % 16 == 0 and all(stride > 0 and stride % 16 == 0 for stride in query.stride()[:3])
    return (
        query.is_cuda
        and _is_hopper(query.device)
        and triton.__version__.startswith(GLUON_VERSIONS)
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[3] in (64, 128)
        and query.stride(3) == 1
        and aligned
        and rule.block_size == 128
        and rule.min_blocks == 0
        and not rule.kv_masks
        and math.copysign(1, rule.scale) > 0
        and rule.log2_alpha >= SMALLEST_LOG2_ALPHA.value
    )


def pool_keys(key: Tensor, block_size: int, bounds: Tensor | None = None) -> Tensor:
    """Means of the key blocks in key's dtype: [B, Hkv, S_kv, D] to [B, Hkv, N, D].

    Args:
        bounds: int32 [B, 2], contiguous: start and end of each batch entry's one sequence, whose keys alone are pooled.
    """
    batch, heads, kv_len, head_dim = key.shape
    columns = ceil_div(kv_len, block_size)
    # the interpreter truncates to bfloat16 instead of rounding: there, round outside
    dtype = key.dtype if key.is_cuda else torch.float32
    means = torch.empty(batch, heads, columns, head_dim, dtype=dtype, device=key.device)
    pool_kernel[(columns, batch * heads)](
        key,
        means,
        *key.stride(),
        kv_len,
        columns,
        heads,
        key if bounds is None else bounds,
        D=head_dim,
        D_PAD=triton.next_power_of_2(head_dim),
        BLOCK=block_size,
        BOUNDS=bounds is not None,
        num_warps=1,  # 4.2 TB/s on an H200; with 4 it is 3.2
    )
    return means.to(key.dtype)


def score_words(query: Tensor, means: Tensor, kv_len: int, rule: Rule, bounds: Tensor | None = None) -> Tensor:
    """A BlockMap's words, int32 [B, Hq, M, ceil(N / 32)], from the means of the kv_len keys' blocks. See PrefillConfig.

    Args:
        means: [B, Hkv, N, D].
        bounds: int32 [B, 2], contiguous: start and end of each batch entry's one sequence.
    """
    if not query.is_cuda:
        # the interpreter's dot is wrong for bfloat16; products of bfloat16 are exact in float32
        query, means = query.float(), means.float()
    batch, heads, q_len, head_dim = query.shape
    columns = means.shape[2]
    rows = ceil_div(q_len, rule.block_size)
    width = ceil_div(columns, WORD_BITS)
    cut = bounds is not None or rule.sliding_window > 0
    if cut and bounds is None:
        bounds = torch.zeros(batch, 2, dtype=torch.int32, device=query.device)
        bounds[:, 1] = kv_len
    launch = _launch(query, rule, cut)
    query_blocks = max(1, launch.query_rows // rule.block_size)
    group = heads // means.shape[1]
    members = group if rule.kv_masks else 1
    tiles = batch * heads // members * ceil_div(rows, query_blocks)
    programs = min(tiles, launch.programs * _multiprocessors(query.device))
    scratch_stride = ceil_div(width, LARGEST_STEP) * LARGEST_STEP * WORD_BITS
    words = torch.empty(batch, heads, rows, width, dtype=torch.int32, device=query.device)
    scratch = torch.empty(programs, members, query_blocks, scratch_stride, dtype=torch.float32, device=query.device)
    # not 0, which times a hidden product's -inf would be NaN
    qk_scale = math.copysign(max(abs(rule.scale) * LOG2_E, SMALLEST_SCALE), rule.scale)
    blocks = rule.sink_blocks, rule.window_blocks, rule.last_full_blocks
    if launch.hopper:
        from flexprefill.search import hopper

        heads_total = batch * heads
        hopper.search_kernel[(programs,)](
            *hopper.describe(query, means),
            *(words, scratch, scratch_stride, kv_len - q_len, q_len, kv_len, rows, columns, width, heads_total, heads),
            *(programs // heads_total, programs % heads_total, qk_scale, rule.log2_alpha, *blocks),
            GROUP=group,
            FIRST_KEY=rule.first_key,
            WORDS=min(LARGEST_STEP, max(8, triton.next_power_of_2(width))),
            num_warps=launch.warps,
            maxnreg=launch.registers,
        )
        return words
    head_pad = triton.next_power_of_2(head_dim)
    search_kernel[(programs,)](
        *(query, means, words, scratch, *query.stride()[:3], scratch_stride),
        *(q_len, kv_len, rows, columns, width, tiles, heads, group, qk_scale, rule.log2_alpha, *blocks),
        rule.min_blocks,
        query.stride(3),
        words if bounds is None else bounds,
        rule.sliding_window or kv_len,
        D=head_dim,
        D_PAD=head_pad,
        BLOCK=rule.block_size,
        QUERY_BLOCKS=query_blocks,
        TILE=launch.tile,
        D_STEP=min(launch.d_step, head_pad),
        WORDS=max(1, 32 // query_blocks),
        MEMBERS=members,
        FIRST_KEY=rule.first_key,
        CUT=cut,
        num_warps=launch.warps,
        num_stages=launch.stages,
        maxnreg=launch.registers,
    )
    return words


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # the interpreter runs programs one by one: a few of them exercise the persistent loop
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
