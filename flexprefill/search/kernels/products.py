from __future__ import annotations

import triton
import triton.language as tl

from flexprefill.search.kernels.visibility import gives_score
from flexprefill.variant import logits

LOG2_E = tl.constexpr(logits.LOG2_E)


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
def own_products(own_base, alone, inputs, D: tl.constexpr, D_PAD: tl.constexpr, D_STEP: tl.constexpr):
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
def tile_products(
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
            sees = gives_score(j[:, None], position[None, :], start, end, sliding_window, BLOCK, FIRST_KEY)
        else:
            first_to_see = j * BLOCK - offset if FIRST_KEY else tl.minimum((j + 1) * BLOCK, kv_len) - 1 - offset
            sees = (row[None, :] >= first_to_see[:, None]) & (row[None, :] < q_len)
        products = tl.where(sees, products, hidden)
    return tl.reshape(products, [TILE, row.shape[0] // BLOCK, BLOCK])


@triton.jit
def load_queries(query_base, stride_s, stride_d, row, q_len, D: tl.constexpr, D_PAD: tl.constexpr):
    """The rows of one head's query blocks, transposed: [D, rows]."""
    d = tl.arange(0, D_PAD)
    offsets = row.to(tl.int64)[:, None] * stride_s + d[None, :] * stride_d
    mask = (row[:, None] < q_len) & (d[None, :] < D)
    return tl.trans(tl.load(query_base + offsets, mask=mask, other=0.0))
