"""The scoring kernel in Triton: scores the blocks, finds each row's threshold and writes the bits."""

from __future__ import annotations

import triton
import triton.language as tl

from flexprefill.search.kernels.products import load_queries, own_products, tile_products
from flexprefill.search.kernels.sums import add_log_sums, add_sums, best_of_group, load_scores, shift_by
from flexprefill.search.kernels.visibility import any_row, is_scored, rows_of_block

SMALLEST_LOG2_ALPHA = tl.constexpr(-100.0)  # below it a block kept could underflow


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
        "sequence_stride",
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
    starts_ptr,
    ends_ptr,
    sequence_stride,
    sliding_window,
    inner_scale,
    cap,
    alibi_ptr,
    log2_alphas_ptr,
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
    SEQUENCES: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    ALIBI: tl.constexpr,
    ALPHAS: tl.constexpr,
):
    """A persistent grid over (QUERY_BLOCKS neighbouring query blocks, mask): scores into scratch rows of the
    program, then the bits. MEMBERS query heads share a mask: each has scratch rows of its own, added as they are read.

    The products are transposed, means × queries, so that the sums over the query rows run along each thread's own
    registers, and neighbouring query blocks share each tile of means. The sums are taken relative to the largest
    score of the query block's first block, wherever that is in a tile: a sequence gets the same bits alone and among
    others. Where a sum could overflow or hide a score that is not finite, the query block is scored again relative to
    each block's own maximum. Query blocks go from the last, which see most, to the first.

    CUT: rows see their own sequence (SEQUENCES) in a sliding window. Scores then begin with the tile of the first block
    that a row sees. SOFT_CAP and ALIBI make log2 scores of the products, and qk_scale is 1; with ALIBI, whose distances
    soon outweigh products, all are relative to each block's own maximum. ALPHAS: each query head has a threshold of its
    own.
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
    means_rows = columns
    if SEQUENCES:
        means_rows = 2 * columns + kv_len
    for tile in range(program, tiles, tl.num_programs(0)):
        I0 = (groups - 1 - tile // masks_total) * QUERY_BLOCKS
        batch_head = (tile % masks_total).to(tl.int64) * MEMBERS  # the first of the mask's
        I = I0 + q
        row = I0 * BLOCK + r
        position = row + offset
        last = offset + tl.minimum((I + 1) * BLOCK, q_len) - 1  # position of the block's last row
        visible = last // BLOCK + 1
        first_tile = 0
        rows_own = (position, 0, kv_len, sliding_window, offset)
        if CUT:
            start = tl.where(row < q_len, 0, kv_len)
            end = tl.where(row < q_len, kv_len, 0)
            first_row = offset + I * BLOCK
            first_start = tl.where(I < rows, 0, kv_len)
            first_end = tl.where(I < rows, kv_len, 0)
            if SEQUENCES:
                starts = starts_ptr + (batch_head // HEADS) * sequence_stride
                ends = ends_ptr + (batch_head // HEADS) * sequence_stride
                start = tl.load(starts + position, mask=row < q_len, other=kv_len)
                end = tl.load(ends + position, mask=row < q_len, other=0)
                first_start = tl.load(starts + first_row, mask=I < rows, other=kv_len)
                first_end = tl.load(ends + first_row, mask=I < rows, other=0)
            rows_own = (position, start, end, sliding_window, offset)
            # blocks before that of the first row: its own sequence's rows alone see them
            low = first_row // BLOCK
            inside = first_start < first_end
            far_edge = first_row - sliding_window + 1
            lowest = tl.where(inside, tl.maximum(first_start, far_edge) // BLOCK, low)
            # the first block that gets a score from the first row
            base = lowest
            if not FIRST_KEY:
                base = tl.where(first_start < far_edge, (far_edge + BLOCK - 1) // BLOCK, first_start // BLOCK)
            own_visible = tl.where(inside, tl.minimum(last, first_end - 1) // BLOCK + 1, 0)
            sinks_end = first_start // BLOCK + sink
            last_rows = (tl.maximum(first_end - offset, 0) + BLOCK - 1) // BLOCK
            all_kept = (I >= last_rows - last_full) | (own_visible <= sinks_end)
            window_start = tl.where(all_kept, 0, own_visible - window)
            # that one and the next, row by row
            block_of_row = I0 + r // BLOCK
            low_of_row = (offset + block_of_row * BLOCK) // BLOCK
            last_of_row = offset + tl.minimum((block_of_row + 1) * BLOCK, q_len) - 1
            blocks = (sink, window, last_full)
            scores, kept = rows_of_block(low_of_row, block_of_row, last_of_row, rows_own, blocks, BLOCK, FIRST_KEY)
            here, here_kept = any_row(scores, QUERY_BLOCKS, BLOCK), any_row(kept, QUERY_BLOCKS, BLOCK)
            scores, kept = rows_of_block(low_of_row + 1, block_of_row, last_of_row, rows_own, blocks, BLOCK, FIRST_KEY)
            behind, behind_kept = any_row(scores, QUERY_BLOCKS, BLOCK), any_row(kept, QUERY_BLOCKS, BLOCK)
            compares = (tl.minimum(window_start, low) > lowest) | (here & (here_kept == 0))
            compares = (I < rows) & (compares | (behind & (behind_kept == 0)))
            scored = tl.where(compares, visible, 0)
            most = tl.max(scored, 0)
            first_tile = tl.min(tl.where(compares, lowest, most), 0) // TILE * TILE
            tile_seen = (
                low[None, :], first_row[None, :], last[None, :], first_start[None, :], first_end[None, :],
                sliding_window, here[None, :], behind[None, :],
            )  # fmt: skip
            word_seen = (
                low[:, None, None], first_row[:, None, None], last[:, None, None], first_start[:, None, None],
                first_end[:, None, None], sliding_window, here[:, None, None], behind[:, None, None],
            )  # fmt: skip
        else:
            window_start = tl.where((I >= rows - last_full) | (visible <= sink), 0, visible - window)
            compares = (I < rows) & (window_start > 0)  # else all is kept whatever the scores
            # blocks that the last row sees, whole if not FIRST_KEY
            seen = visible
            if not FIRST_KEY:
                seen = tl.where(last + 1 == kv_len, columns, (last + 1) // BLOCK)
            scored = tl.where(compares, seen, 0)
            most = tl.max(scored, 0)
            base = tl.zeros([QUERY_BLOCKS], tl.int32)
            tile_seen = 0
            word_seen = 0
        threshold = tl.zeros([QUERY_BLOCKS], tl.float32)
        logs = I >= 0  # where scores are in log2; else sums relative to 2^shift
        if most > 0:
            best = tl.full([TILE, QUERY_BLOCKS], float("-inf"), tl.float32)
            batch_base = query_ptr + (batch_head // HEADS) * stride_b
            head = batch_head % HEADS
            own_log2_alpha = log2_alpha
            if ALPHAS:
                own_log2_alpha = tl.load(log2_alphas_ptr + head)
            means_base = means_ptr + (batch_head // GROUP) * means_rows * D
            own_base = means_base + (2 * columns + offset).to(tl.int64) * D
            alone = row < 0
            some_alone = False
            if SEQUENCES:
                block_start = position // BLOCK * BLOCK
                alone = (start > block_start) & (start < end) & (end < tl.minimum(block_start + BLOCK, kv_len))
                some_alone = tl.max(alone.to(tl.int32), 0) > 0
            own = tl.zeros([QUERY_BLOCKS * BLOCK], tl.float32)
            modifiers = (inner_scale, cap, 0.0, 0.0, 0.0)
            # blocks in tiles that every row sees whole
            unmasked = (offset + I0 * BLOCK + 1) // BLOCK // TILE * TILE
            if q_len < (I0 + QUERY_BLOCKS) * BLOCK:
                unmasked = 0
            if CUT:
                # all rows of one sequence, and the far edges of their windows in the first tile
                farthest = tl.maximum(tl.max(start, 0), offset + (I0 + QUERY_BLOCKS) * BLOCK - sliding_window)
                if (tl.min(start, 0) != tl.max(start, 0)) | (farthest > (first_tile + TILE) * BLOCK):
                    unmasked = 0
            q_t = 0.0
            if D_STEP == D_PAD:
                # also for the second pass: loaded once more there, it would cost the hot loop registers
                q_t = load_queries(batch_base + head * stride_h, stride_s, stride_d, row, q_len, D, D_PAD)
            if (D_STEP == D_PAD) and not ALIBI:  # noqa: SIM102
                if (min_blocks == 0) & (own_log2_alpha >= SMALLEST_LOG2_ALPHA):
                    shift = tl.zeros([QUERY_BLOCKS], tl.float32)
                    doubtful = tl.zeros([TILE, QUERY_BLOCKS], tl.int1)
                    for member in range(0, MEMBERS):
                        scratch = scratch_base + member * member_stride
                        query_base = batch_base + (head + member) * stride_h
                        if MEMBERS > 1:
                            q_t = load_queries(query_base, stride_s, stride_d, row, q_len, D, D_PAD)
                        inputs = (query_base, q_t, columns, row, q_len, stride_s, stride_d)
                        if SEQUENCES:  # noqa: SIM102
                            if some_alone:
                                own = own_products(own_base, alone, inputs, D, D_PAD, D_STEP)
                        products = tile_products(
                            means_base, first_tile, inputs, rows_own, own, modifiers, kv_len, hidden,
                            D, D_PAD, D_STEP, TILE, BLOCK, FIRST_KEY, True, CUT, SEQUENCES, SOFT_CAP, ALIBI,
                        )  # fmt: skip
                        if member == 0:
                            shift = shift_by(products, first_tile, base, qk_scale)
                        best, doubtful = add_sums(
                            products, qk_scale, shift, scratch, first_tile, columns, scratch_stride, scored[None, :],
                            tile_seen, best, doubtful, BLOCK, FIRST_KEY, CUT,
                        )  # fmt: skip
                        for j0 in range(first_tile + TILE, unmasked, TILE):
                            products = tile_products(
                                means_base, j0, inputs, rows_own, own, modifiers, kv_len, hidden,
                                D, D_PAD, D_STEP, TILE, BLOCK, FIRST_KEY, False, CUT, SEQUENCES, SOFT_CAP, ALIBI,
                            )  # fmt: skip
                            best, doubtful = add_sums(
                                products, qk_scale, shift, scratch, j0, columns, scratch_stride, scored[None, :],
                                tile_seen, best, doubtful, BLOCK, FIRST_KEY, CUT,
                            )  # fmt: skip
                        for j0 in range(tl.maximum(unmasked, first_tile + TILE), most, TILE):
                            products = tile_products(
                                means_base, j0, inputs, rows_own, own, modifiers, kv_len, hidden,
                                D, D_PAD, D_STEP, TILE, BLOCK, FIRST_KEY, True, CUT, SEQUENCES, SOFT_CAP, ALIBI,
                            )  # fmt: skip
                            if CUT and QUERY_BLOCKS > 1:
                                # a later query block's first block may lie in a later tile
                                starts_here = (base >= j0) & (base < j0 + TILE) & (member == 0)
                                shift = tl.where(starts_here, shift_by(products, j0, base, qk_scale), shift)
                            best, doubtful = add_sums(
                                products, qk_scale, shift, scratch, j0, columns, scratch_stride, scored[None, :],
                                tile_seen, best, doubtful, BLOCK, FIRST_KEY, CUT,
                            )  # fmt: skip
                    if MEMBERS > 1:
                        tl.debug_barrier()
                        best, doubtful = best_of_group(
                            scratch_base, scratch_stride, member_stride, first_tile, most, scored[None, :], tile_seen,
                            False, TILE, MEMBERS, BLOCK, FIRST_KEY, CUT,
                        )  # fmt: skip
                        tl.debug_barrier()  # scores that are taken again overwrite those that others may still read
                    logs = tl.max(doubtful.to(tl.int32), 0) != 0
                    threshold = tl.max(best, 0) * tl.exp2(own_log2_alpha)
            if tl.max(logs.to(tl.int32), 0) != 0:
                # ALiBi's arithmetic is much simpler in tiles that every row sees whole
                done = 0
                if ALIBI:
                    done = tl.maximum(unmasked - first_tile - TILE, 0)
                best = tl.full([TILE, QUERY_BLOCKS], float("-inf"), tl.float32)
                for member in range(0, MEMBERS):
                    scratch = scratch_base + member * member_stride
                    query_base = batch_base + (head + member) * stride_h
                    if (D_STEP == D_PAD) and (MEMBERS > 1):
                        q_t = load_queries(query_base, stride_s, stride_d, row, q_len, D, D_PAD)
                    inputs = (query_base, q_t, columns, row, q_len, stride_s, stride_d)
                    if SEQUENCES:  # noqa: SIM102
                        if some_alone:
                            own = own_products(own_base, alone, inputs, D, D_PAD, D_STEP)
                    if ALIBI:
                        of_head = alibi_ptr + head + member
                        slope, share, whole = tl.load(of_head), tl.load(of_head + HEADS), tl.load(of_head + 2 * HEADS)
                        modifiers = (inner_scale, cap, slope, share, whole)
                        for j0 in range(first_tile + TILE, unmasked, TILE):
                            products = tile_products(
                                means_base, j0, inputs, rows_own, own, modifiers, kv_len, hidden,
                                D, D_PAD, D_STEP, TILE, BLOCK, FIRST_KEY, False, CUT, SEQUENCES, SOFT_CAP, ALIBI,
                            )  # fmt: skip
                            best = add_log_sums(products, qk_scale, scratch, j0, columns, scratch_stride, logs, best)
                    for step in range(first_tile, most - done, TILE):
                        j0 = step + tl.where(step > first_tile, done, 0)
                        products = tile_products(
                            means_base, j0, inputs, rows_own, own, modifiers, kv_len, hidden,
                            D, D_PAD, D_STEP, TILE, BLOCK, FIRST_KEY, True, CUT, SEQUENCES, SOFT_CAP, ALIBI,
                        )  # fmt: skip
                        best = add_log_sums(products, qk_scale, scratch, j0, columns, scratch_stride, logs, best)
                if MEMBERS > 1:
                    tl.debug_barrier()
                    best, _ = best_of_group(
                        scratch_base, scratch_stride, member_stride, first_tile, most, scored[None, :], tile_seen,
                        True, TILE, MEMBERS, BLOCK, FIRST_KEY, CUT,
                    )  # fmt: skip
                threshold = tl.where(logs, tl.max(best, 0) + own_log2_alpha, threshold)
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
                    mask = is_scored(j[:, None], scored[None, :], tile_seen, BLOCK, FIRST_KEY, CUT)
                    offsets = q[None, :] * scratch_stride + j[:, None]
                    L = load_scores(scratch_base, offsets, member_stride, mask, float("-inf"), True, MEMBERS)
                    below = tl.maximum(
                        below, tl.where((tl.abs(L) < float("inf")) & (kth[None, :] > L), L, float("-inf"))
                    )
                kth = tl.where(count < min_blocks, tl.max(below, 0), kth)
                equal = tl.zeros([TILE, QUERY_BLOCKS], tl.int32)
                for j0 in range(first_tile, most, TILE):
                    j = j0 + tl.arange(0, TILE)
                    mask = is_scored(j[:, None], scored[None, :], tile_seen, BLOCK, FIRST_KEY, CUT)
                    offsets = q[None, :] * scratch_stride + j[:, None]
                    L = load_scores(scratch_base, offsets, member_stride, mask, float("nan"), True, MEMBERS)
                    equal += (L >= kth[None, :]).to(tl.int32)
                count = tl.sum(equal, 0)
            # a row that has no more than these keeps them all
            threshold = tl.minimum(threshold, tl.where(scored > min_blocks, kth, float("-inf")))

        words_row = words_ptr + (batch_head * rows + I0) * width
        for w0 in range(0, width, WORDS):
            w = w0 + tl.arange(0, WORDS)
            j = w[None, :, None] * 32 + tl.arange(0, 32)[None, None, :]
            scored_here = is_scored(j, scored[:, None, None], word_seen, BLOCK, FIRST_KEY, CUT)
            offsets = q[:, None, None] * scratch_stride + j
            in_logs = logs[:, None, None]
            L = load_scores(scratch_base, offsets, member_stride, scored_here, float("-inf"), in_logs, MEMBERS)
            chosen = scored_here & ((L >= threshold[:, None, None]) | ((tl.abs(L) < float("inf")) == 0))
            if CUT:
                always = (j < sinks_end[:, None, None]) | (j >= window_start[:, None, None])
                keep = (j >= lowest[:, None, None]) & (j < low[:, None, None]) & (chosen | always)
                keep = keep | ((j == low[:, None, None]) & (chosen | here_kept[:, None, None]))
                keep = keep | ((j == low[:, None, None] + 1) & (chosen | behind_kept[:, None, None]))
            else:
                keep = (j < visible[:, None, None]) & (chosen | (j < sink) | (j >= window_start[:, None, None]))
            bits = tl.sum(keep.to(tl.int32) << tl.arange(0, 32)[None, None, :], 2)
            for member in tl.static_range(0, MEMBERS):
                words_member = words_row + member * rows * width
                inside_words = (w[None, :] < width) & (I[:, None] < rows)
                tl.store(words_member + q[:, None] * width + w[None, :], bits, mask=inside_words)
        # the next tile overwrites scores that other threads may still read
        tl.debug_barrier()
