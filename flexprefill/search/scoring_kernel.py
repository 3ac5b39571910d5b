"""The scoring kernel in Triton: scores the blocks, finds each row's threshold and writes the bits."""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
SMALLEST_LOG2_ALPHA = tl.constexpr(-100.0)  # below it a block kept could underflow
LARGE = tl.constexpr(1e30)  # products below it are far from overflow in float32


@triton.jit
def _gives_score(j, position, start, end, sliding_window, BLOCK: tl.constexpr, FIRST_KEY: tl.constexpr):
    """Whether a row gives a score to block j: it sees all keys of it that are of its own sequence (FIRST_KEY: one)."""
    own_first = tl.maximum(j * BLOCK, start)
    own_last = tl.minimum((j + 1) * BLOCK, end) - 1
    nearest = own_first if FIRST_KEY else own_last
    farthest = (own_last if FIRST_KEY else own_first) + sliding_window - 1
    return (own_first <= own_last) & (position >= nearest) & (position <= farthest)


@triton.jit
def _is_scored(j, scored, rows_seen, BLOCK: tl.constexpr, FIRST_KEY: tl.constexpr, CUT: tl.constexpr):
    """Which blocks j have a score from a query block; all arguments broadcast against each other.

    CUT: blocks before the first row's own position are seen by its sequence's rows alone, and about the next two, in
    which sequences may start and end, something is said that was found row by row.
    """
    is_scored = j < scored
    if CUT:
        low, first_row, last, start, end, sliding_window, here, behind = rows_seen
        own_first = tl.maximum(j * BLOCK, start)
        own_last = tl.minimum((j + 1) * BLOCK, end) - 1
        nearest = own_first if FIRST_KEY else own_last
        farthest = (own_last if FIRST_KEY else own_first) + sliding_window - 1
        before = (own_first <= own_last) & (tl.maximum(nearest, first_row) <= tl.minimum(farthest, last))
        is_scored = is_scored & (((j < low) & before) | ((j == low) & here) | ((j == low + 1) & behind))
    return is_scored


@triton.jit
def _any_row(flags, QUERY_BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Whether a flag of the rows [rows] is set in each query block: [QUERY_BLOCKS]."""
    return tl.max(tl.reshape(flags.to(tl.int32), [QUERY_BLOCKS, BLOCK]), 1) > 0


@triton.jit
def _rows_of_block(j, I, last, rows_own, blocks, BLOCK: tl.constexpr, FIRST_KEY: tl.constexpr):
    """Whether each row gives a score to its block j, and whether it keeps it whatever the scores are; all [rows]."""
    position, start, end, sliding_window, offset = rows_own
    sink, window, last_full = blocks
    scores = _gives_score(j, position, start, end, sliding_window, BLOCK, FIRST_KEY)
    first_seen = tl.maximum(tl.maximum(j * BLOCK, start), position - sliding_window + 1)
    sees = first_seen < tl.minimum(tl.minimum((j + 1) * BLOCK, end), position + 1)
    last_own = tl.minimum(last, end - 1)
    last_rows = I * BLOCK + last_full * BLOCK > end - 1 - offset
    return scores, sees & ((j < start // BLOCK + sink) | (j > last_own // BLOCK - window) | last_rows)


@triton.jit
def _one_minus_exp(x):
    """1 - exp(-x), where it is small too."""
    series = x * (1 - x / 2 * (1 - x / 3 * (1 - x / 4 * (1 - x / 5))))
    return tl.where(tl.abs(x) < 0.1, series, 1 - tl.exp2(x * (-LOG2_E)))


@triton.jit
def _modified(
    products,
    j,
    rows_own,
    modifiers,
    BLOCK: tl.constexpr,
    FIRST_KEY: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    ALIBI: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Log2 scores of products [J, rows]: as reference.log_scores has them with a soft cap and ALiBi."""
    inner, cap, slope, log2_share, whole_ratio = modifiers
    factor = inner
    if SOFT_CAP:
        # tanh; exact to float32's rounding of 1, as scores relative to the cap need
        products = 1 - 2 / (tl.exp2(products * inner * (2 * LOG2_E)) + 1)
        factor = cap
    if not ALIBI:
        return products * factor
    position, start, end, sliding_window, _ = rows_own
    position = position[None, :]
    seen_end = (j + 1) * BLOCK
    ratio = whole_ratio
    if MASKED:
        seen_first = tl.maximum(j * BLOCK, start)
        seen_end = tl.minimum(seen_end, end)
        if FIRST_KEY:
            seen_first = tl.maximum(seen_first, position - sliding_window + 1)
            seen_end = tl.minimum(seen_end, position + 1)
        count = tl.maximum(seen_end - seen_first, 1).to(tl.float32)
        ratio = tl.log2(tl.abs(_one_minus_exp(slope * count))) - log2_share - tl.log2(count)
        ratio = tl.where(count == BLOCK, whole_ratio, tl.where(slope == 0, 0.0, ratio))
    nearest = (position - seen_end + 1).to(tl.float32)
    # fused by name: whole blocks get the same bits in every tile, masked or not
    return tl.fma(products, factor, tl.fma(nearest, slope * (-LOG2_E), ratio))


@triton.jit
def _dots(means_base, j, inputs, D: tl.constexpr, D_PAD: tl.constexpr, D_STEP: tl.constexpr, MASKED: tl.constexpr):
    """Products of means [J, D] with the rows of query blocks: float32 [J, rows]."""
    query_base, q_t, columns, row, q_len, stride_s, stride_d = inputs
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
            part = _query_part(query_base, d, row, q_len, stride_s, stride_d, D)
            products = tl.dot(means, part, products, input_precision="ieee")
    return products


@triton.jit
def _query_part(query_base, d, row, q_len, stride_s, stride_d, D: tl.constexpr):
    """Dimensions d of the rows, transposed: [d, rows]."""
    offsets = row.to(tl.int64)[None, :] * stride_s + d[:, None] * stride_d
    return tl.load(query_base + offsets, mask=(row[None, :] < q_len) & (d[:, None] < D), other=0.0)


@triton.jit
def _own_products(own_base, alone, inputs, D: tl.constexpr, D_PAD: tl.constexpr, D_STEP: tl.constexpr):
    """Products of rows with the means of their own sequences in their own blocks, where these lie alone: [rows]."""
    query_base, _, _, row, q_len, stride_s, stride_d = inputs
    products = tl.zeros([row.shape[0]], tl.float32)
    for d0 in range(0, D_PAD, D_STEP):
        d = d0 + tl.arange(0, D_STEP)
        part = _query_part(query_base, d, row, q_len, stride_s, stride_d, D).to(tl.float32)
        mask = alone[None, :] & (d[:, None] < D)
        means = tl.load(own_base + row.to(tl.int64)[None, :] * D + d[:, None], mask=mask, other=0.0)
        products += tl.sum(part * means.to(tl.float32), 0)
    return products


@triton.jit
def _tile_products(
    means_base,
    j0,
    inputs,
    rows_own,
    own,
    modifiers,
    kv_len,
    hidden,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    D_STEP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST_KEY: tl.constexpr,
    MASKED: tl.constexpr,
    CUT: tl.constexpr,
    SEQUENCES: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    ALIBI: tl.constexpr,
):
    """Products of a tile of means with the query blocks, transposed: float32 [J, query blocks, rows].

    MASKED puts hidden where a row does not see the whole of block j (FIRST_KEY: its first key), or is past the end.
    CUT: of block j what its sequence has there, in its window.
    """
    columns, row, q_len = inputs[2], inputs[3], inputs[4]
    position, start, end, sliding_window, offset = rows_own
    j = j0 + tl.arange(0, TILE)
    products = _dots(means_base, j, inputs, D, D_PAD, D_STEP, MASKED)
    if SEQUENCES and MASKED:
        first_block = tl.where((start % BLOCK != 0) & (start < end), start // BLOCK, -1)
        # only in the block in which a sequence starts its keys are not those that the block's first key is of
        if tl.max(((first_block >= j0) & (first_block < j0 + TILE)).to(tl.int32), 0) > 0:
            of_last = _dots(means_base + columns * D, j, inputs, D, D_PAD, D_STEP, MASKED)
            starts_inside = start[None, :] > j[:, None] * BLOCK
            products = tl.where(starts_inside, of_last, products)
            ends_inside = end[None, :] < tl.minimum((j + 1) * BLOCK, kv_len)[:, None]
            products = tl.where(starts_inside & ends_inside, own[None, :], products)
    if CUT:
        start, end = start[None, :], end[None, :]
    if SOFT_CAP or ALIBI:
        own_rows = (position, start, end, sliding_window, offset)
        products = _modified(products, j[:, None], own_rows, modifiers, BLOCK, FIRST_KEY, SOFT_CAP, ALIBI, MASKED)
    if MASKED:
        if CUT:
            sees = _gives_score(j[:, None], position[None, :], start, end, sliding_window, BLOCK, FIRST_KEY)
        else:
            first_to_see = j * BLOCK - offset if FIRST_KEY else tl.minimum((j + 1) * BLOCK, kv_len) - 1 - offset
            sees = (row[None, :] >= first_to_see[:, None]) & (row[None, :] < q_len)
        products = tl.where(sees, products, hidden)
    return tl.reshape(products, [TILE, row.shape[0] // BLOCK, BLOCK])


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
def _store(scratch_base, scores, j, inside, stride, best):
    """Stores block scores [J, query blocks] inside, and returns the running maxima of the finite ones."""
    q = tl.arange(0, scores.shape[1])
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
    """Block scores, of the query heads that share a mask together: sums, or where logs is set log2 of sums."""
    scores = tl.load(scratch_base + offsets, mask=mask, other=other)
    for member in tl.static_range(1, MEMBERS):
        more = tl.load(scratch_base + member * member_stride + offsets, mask=mask, other=other)
        best = tl.maximum(scores, more)
        shift = tl.where(tl.abs(best) == float("inf"), 0.0, best)
        log_sums = shift + tl.log2(tl.exp2(scores - shift) + tl.exp2(more - shift))
        scores = tl.where(logs, log_sums, scores + more)
    return scores


@triton.jit
def _best_of_group(
    scratch_base,
    stride,
    member_stride,
    first_tile,
    most,
    scored,
    rows_seen,
    logs,
    TILE: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST_KEY: tl.constexpr,
    CUT: tl.constexpr,
):
    """The greatest finite scores of each query block [TILE, query blocks], and where the sums say too little."""
    q = tl.arange(0, scored.shape[1])
    best = tl.full([TILE, scored.shape[1]], float("-inf"), tl.float32)
    doubtful = tl.zeros([TILE, scored.shape[1]], tl.int1)
    for j0 in range(first_tile, most, TILE):
        j = j0 + tl.arange(0, TILE)
        mask = _is_scored(j[:, None], scored, rows_seen, BLOCK, FIRST_KEY, CUT)
        offsets = q[None, :] * stride + j[:, None]
        scores = _load_scores(scratch_base, offsets, member_stride, mask, float("-inf"), logs, MEMBERS)
        best = tl.maximum(best, tl.where(tl.abs(scores) < float("inf"), scores, float("-inf")))
        doubtful = doubtful | (mask & ((scores == 0) | (scores == float("inf"))))
    return best, doubtful


@triton.jit
def _shift_by(products, j0, base, qk_scale):
    """The largest score of each query block's block base, 0 where the tile from j0 does not have it or it is huge."""
    j = j0 + tl.arange(0, products.shape[0])
    shift = tl.max(tl.where(j[:, None] == base[None, :], tl.max(products * qk_scale, 2), float("-inf")), 0)
    return tl.where(tl.abs(shift) < LARGE, shift, 0.0)


@triton.jit
def _add_sums(
    products,
    qk_scale,
    shift,
    scratch_base,
    j0,
    columns,
    stride,
    scored,
    rows_seen,
    best,
    doubtful,
    BLOCK: tl.constexpr,
    FIRST_KEY: tl.constexpr,
    CUT: tl.constexpr,
):
    """Stores a tile's block scores relative to 2^shift; doubtful where that says too little."""
    j = j0 + tl.arange(0, products.shape[0])
    sums = _sums(products, qk_scale, shift)
    best = _store(scratch_base, sums, j, j[:, None] < columns, stride, best)
    is_scored = _is_scored(j[:, None], scored, rows_seen, BLOCK, FIRST_KEY, CUT)
    return best, doubtful | (is_scored & ((sums == 0) | (sums == float("inf"))))


@triton.jit
def _add_log_sums(products, qk_scale, scratch_base, j0, columns, stride, logs, best):
    """Stores log2 of a tile's block scores, of the query blocks where logs is set."""
    j = j0 + tl.arange(0, products.shape[0])
    inside = (j[:, None] < columns) & logs[None, :]
    return _store(scratch_base, _log_sums(products, qk_scale), j, inside, stride, best)


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
            scores, kept = _rows_of_block(low_of_row, block_of_row, last_of_row, rows_own, blocks, BLOCK, FIRST_KEY)
            here, here_kept = _any_row(scores, QUERY_BLOCKS, BLOCK), _any_row(kept, QUERY_BLOCKS, BLOCK)
            scores, kept = _rows_of_block(low_of_row + 1, block_of_row, last_of_row, rows_own, blocks, BLOCK, FIRST_KEY)
            behind, behind_kept = _any_row(scores, QUERY_BLOCKS, BLOCK), _any_row(kept, QUERY_BLOCKS, BLOCK)
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
                q_t = _load_queries(batch_base + head * stride_h, stride_s, stride_d, row, q_len, D, D_PAD)
            if (D_STEP == D_PAD) and not ALIBI:  # noqa: SIM102
                if (min_blocks == 0) & (own_log2_alpha >= SMALLEST_LOG2_ALPHA):
                    shift = tl.zeros([QUERY_BLOCKS], tl.float32)
                    doubtful = tl.zeros([TILE, QUERY_BLOCKS], tl.int1)
                    for member in range(0, MEMBERS):
                        scratch = scratch_base + member * member_stride
                        query_base = batch_base + (head + member) * stride_h
                        if MEMBERS > 1:
                            q_t = _load_queries(query_base, stride_s, stride_d, row, q_len, D, D_PAD)
                        inputs = (query_base, q_t, columns, row, q_len, stride_s, stride_d)
                        if SEQUENCES:  # noqa: SIM102
                            if some_alone:
                                own = _own_products(own_base, alone, inputs, D, D_PAD, D_STEP)
                        products = _tile_products(
                            means_base, first_tile, inputs, rows_own, own, modifiers, kv_len, hidden,
                            D, D_PAD, D_STEP, TILE, BLOCK, FIRST_KEY, True, CUT, SEQUENCES, SOFT_CAP, ALIBI,
                        )  # fmt: skip
                        if member == 0:
                            shift = _shift_by(products, first_tile, base, qk_scale)
                        best, doubtful = _add_sums(
                            products, qk_scale, shift, scratch, first_tile, columns, scratch_stride, scored[None, :],
                            tile_seen, best, doubtful, BLOCK, FIRST_KEY, CUT,
                        )  # fmt: skip
                        for j0 in range(first_tile + TILE, unmasked, TILE):
                            products = _tile_products(
                                means_base, j0, inputs, rows_own, own, modifiers, kv_len, hidden,
                                D, D_PAD, D_STEP, TILE, BLOCK, FIRST_KEY, False, CUT, SEQUENCES, SOFT_CAP, ALIBI,
                            )  # fmt: skip
                            best, doubtful = _add_sums(
                                products, qk_scale, shift, scratch, j0, columns, scratch_stride, scored[None, :],
                                tile_seen, best, doubtful, BLOCK, FIRST_KEY, CUT,
                            )  # fmt: skip
                        for j0 in range(tl.maximum(unmasked, first_tile + TILE), most, TILE):
                            products = _tile_products(
                                means_base, j0, inputs, rows_own, own, modifiers, kv_len, hidden,
                                D, D_PAD, D_STEP, TILE, BLOCK, FIRST_KEY, True, CUT, SEQUENCES, SOFT_CAP, ALIBI,
                            )  # fmt: skip
                            if CUT and QUERY_BLOCKS > 1:
                                # a later query block's first block may lie in a later tile
                                starts_here = (base >= j0) & (base < j0 + TILE) & (member == 0)
                                shift = tl.where(starts_here, _shift_by(products, j0, base, qk_scale), shift)
                            best, doubtful = _add_sums(
                                products, qk_scale, shift, scratch, j0, columns, scratch_stride, scored[None, :],
                                tile_seen, best, doubtful, BLOCK, FIRST_KEY, CUT,
                            )  # fmt: skip
                    if MEMBERS > 1:
                        tl.debug_barrier()
                        best, doubtful = _best_of_group(
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
                        q_t = _load_queries(query_base, stride_s, stride_d, row, q_len, D, D_PAD)
                    inputs = (query_base, q_t, columns, row, q_len, stride_s, stride_d)
                    if SEQUENCES:  # noqa: SIM102
                        if some_alone:
                            own = _own_products(own_base, alone, inputs, D, D_PAD, D_STEP)
                    if ALIBI:
                        of_head = alibi_ptr + head + member
                        slope, share, whole = tl.load(of_head), tl.load(of_head + HEADS), tl.load(of_head + 2 * HEADS)
                        modifiers = (inner_scale, cap, slope, share, whole)
                        for j0 in range(first_tile + TILE, unmasked, TILE):
                            products = _tile_products(
                                means_base, j0, inputs, rows_own, own, modifiers, kv_len, hidden,
                                D, D_PAD, D_STEP, TILE, BLOCK, FIRST_KEY, False, CUT, SEQUENCES, SOFT_CAP, ALIBI,
                            )  # fmt: skip
                            best = _add_log_sums(products, qk_scale, scratch, j0, columns, scratch_stride, logs, best)
                    for step in range(first_tile, most - done, TILE):
                        j0 = step + tl.where(step > first_tile, done, 0)
                        products = _tile_products(
                            means_base, j0, inputs, rows_own, own, modifiers, kv_len, hidden,
                            D, D_PAD, D_STEP, TILE, BLOCK, FIRST_KEY, True, CUT, SEQUENCES, SOFT_CAP, ALIBI,
                        )  # fmt: skip
                        best = _add_log_sums(products, qk_scale, scratch, j0, columns, scratch_stride, logs, best)
                if MEMBERS > 1:
                    tl.debug_barrier()
                    best, _ = _best_of_group(
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
                    mask = _is_scored(j[:, None], scored[None, :], tile_seen, BLOCK, FIRST_KEY, CUT)
                    offsets = q[None, :] * scratch_stride + j[:, None]
                    L = _load_scores(scratch_base, offsets, member_stride, mask, float("-inf"), True, MEMBERS)
                    below = tl.maximum(
                        below, tl.where((tl.abs(L) < float("inf")) & (kth[None, :] > L), L, float("-inf"))
                    )
                kth = tl.where(count < min_blocks, tl.max(below, 0), kth)
                equal = tl.zeros([TILE, QUERY_BLOCKS], tl.int32)
                for j0 in range(first_tile, most, TILE):
                    j = j0 + tl.arange(0, TILE)
                    mask = _is_scored(j[:, None], scored[None, :], tile_seen, BLOCK, FIRST_KEY, CUT)
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
            scored_here = _is_scored(j, scored[:, None, None], word_seen, BLOCK, FIRST_KEY, CUT)
            offsets = q[:, None, None] * scratch_stride + j
            in_logs = logs[:, None, None]
            L = _load_scores(scratch_base, offsets, member_stride, scored_here, float("-inf"), in_logs, MEMBERS)
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
